"use strict";
// The page of `edge-kv serve`: a conversation over the server's own API, and a meter of its memory.

const $ = (id) => document.getElementById(id);
const SAMPLES = 120; // one a second
const FIELDS = ["system", "temperature", "top_k", "top_p", "max_tokens", "seed", "think"];
const messages = []; // {role, content, thinking, figures, failed, article}
const samples = [];
let running = null; // AbortController of the reply under way

// --- settings ---------------------------------------------------------------

for (const id of [...FIELDS, "key"]) {
  const store = id === "key" ? sessionStorage : localStorage;
  $(id).value = store.getItem(`edge-kv.${id}`) || "";
  $(id).addEventListener("change", () => store.setItem(`edge-kv.${id}`, $(id).value));
}

function showSettings(open, field = "system") {
  $("settings").hidden = !open;
  $("toggle-settings").setAttribute("aria-expanded", String(open));
  (open ? $(field) : $("toggle-settings")).focus();
}
$("toggle-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => showSettings(false));

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// --- the conversation -------------------------------------------------------

// Articles stay in place from one drawing to the next: a screen reader hears only what is new, and
// a thought that was opened stays open.
function render() {
  const log = $("log");
  messages.forEach((message, index) => {
    message.article ||= $("turn").content.firstElementChild.cloneNode(true);
    show(message, index);
    if (log.children[index] !== message.article) log.insertBefore(message.article, log.children[index] || null);
  });
  while (log.children.length > messages.length) log.lastElementChild.remove();
  log.scrollTop = log.scrollHeight;
}

function show(message, index) {
  const article = message.article;
  article.className = message.role + (message.failed ? " failed" : "");
  set(article.querySelector("h3"), message.role === "user" ? "You" : "Model");
  fill(message);
  const buttons = [];
  const idle = !running; // the reply under way answers what these would take away
  if (idle && message.role === "user") buttons.push(button("Edit", () => edit(index)));
  if (idle && message.role !== "user" && index === messages.length - 1)
    buttons.push(button("Regenerate", () => regenerate(index)));
  if (message.content && navigator.clipboard) buttons.push(button("Copy", () => navigator.clipboard.writeText(message.content)));
  article.querySelector(".actions").replaceChildren(...buttons);
}

function fill({ article, thinking, content, figures }) {
  article.querySelector("details").hidden = !thinking;
  set(article.querySelector(".thinking"), thinking || "");
  set(article.querySelector(".text"), content.trimStart());
  set(article.querySelector(".figures"), figures || "");
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function button(label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.addEventListener("click", action);
  return made;
}

function edit(index) {
  $("input").value = messages[index].content;
  messages.length = index;
  render();
  $("input").focus();
}

function regenerate(index) {
  messages.length = index;
  reply();
}

function request() {
  // A question whose reply failed was not asked; two questions in a row are no conversation.
  const asked = messages.filter((m, i) => !m.failed && !messages[i + 1]?.failed);
  const sent = asked.map((m) => ({ role: m.role, content: m.content }));
  const system = $("system").value.trim();
  if (system) sent.unshift({ role: "system", content: system });
  const body = { messages: sent, stream: true, stream_options: { include_usage: true } };
  for (const id of ["temperature", "top_k", "top_p", "max_tokens", "seed"])
    if ($(id).value !== "") body[id] = Number($(id).value);
  if ($("think").value) body.chat_template_kwargs = { enable_thinking: $("think").value === "on" };
  return body;
}

async function reply() {
  const answer = { role: "assistant", content: "", thinking: "" };
  const began = performance.now();
  let first = 0, usage = null, finish = "";
  running = new AbortController();
  const body = request();
  messages.push(answer);
  busy(true);
  render();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (response.status === 401) showSettings(true, "key");
    if (!response.ok) throw new Error(await reason(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices && event.choices[0];
      if (!choice) continue;
      finish = choice.finish_reason || finish;
      const { content, reasoning_content: thinking } = choice.delta;
      if (!content && !thinking) continue;
      first = first || performance.now();
      answer.content += content || "";
      answer.thinking += thinking || "";
      const log = $("log");
      const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      fill(answer);
      if (follow) log.scrollTop = log.scrollHeight;
    }
  } catch (e) {
    if (e.name === "AbortError") finish = "stopped";
    else {
      answer.failed = true;
      answer.content = (answer.content ? `${answer.content}\n\n` : "") + e.message;
    }
  }
  answer.figures = figures(usage, finish, first - began, performance.now() - first);
  running = null;
  busy(false);
  render();
  if (document.activeElement === document.body) $("input").focus(); // the button pressed is gone
}

function figures(usage, finish, wait, rest) {
  const parts = [];
  if (usage) {
    const made = usage.completion_tokens;
    parts.push(`${made} tokens`);
    if (made > 1 && rest > 0) parts.push(`${((made - 1) / (rest / 1000)).toFixed(1)} tokens/s`);
    if (wait > 0) parts.push(`first after ${(wait / 1000).toFixed(2)} s`);
  }
  if (finish === "length") parts.push("ended: longest reply or context reached");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answers with status ${response.status}.`;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", String(is));
}

$("composer").addEventListener("submit", (e) => {
  e.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  $("notice").textContent = "";
  messages.push({ role: "user", content: text });
  reply();
});
$("input").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (e) => {
  if (e.key !== "Escape") return;
  if (running) running.abort();
  else if (!$("settings").hidden) showSettings(false);
});
$("stop").addEventListener("click", () => running && running.abort());
$("new-chat").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  render();
  $("input").focus();
});
$("attach").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const file = $("file").files[0];
  $("file").value = "";
  if (!file) return;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    $("input").value += `${$("input").value ? "\n\n" : ""}${file.name}:\n${text}\n`;
    $("notice").textContent = "";
  } catch {
    $("notice").textContent = `${file.name} is not a UTF-8 text file.`;
  }
  $("input").focus();
});

// --- the meter --------------------------------------------------------------

function bytes(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(2)} GB`;
  return count >= 1e6 ? `${(count / 1e6).toFixed(count >= 1e8 ? 0 : 1)} MB` : `${(count / 1e3).toFixed(0)} kB`;
}

function total(m) {
  return m.state + m.heap + m.mapped;
}

function draw(status) {
  const { planned, limit } = status;
  const top = 1.08 * Math.max(planned, limit, ...samples.map(total));
  const x = (i) => 320 - ((samples.length - 1 - i) * 320) / (SAMPLES - 1);
  const y = (v) => 150 - (150 * v) / top;
  // Each kind is drawn from the bottom up to its sum with those below it, the highest first.
  const sums = { "area-state": (m) => m.state, "area-heap": (m) => m.state + m.heap, "area-mapped": total };
  for (const [id, sum] of Object.entries(sums)) {
    const points = samples.map((m, i) => `L${x(i).toFixed(1)},${y(sum(m)).toFixed(1)}`).join("");
    $(id).setAttribute("d", `M${x(0).toFixed(1)},150${points}L320,150Z`);
  }
  for (const [id, value] of [["line-planned", planned], ["line-limit", limit]]) {
    $(id).style.display = value ? "" : "none";
    $(id).setAttribute("y1", y(value));
    $(id).setAttribute("y2", y(value));
  }
}

function tell(status) {
  const { memory, last } = status;
  const held = `${status.used.toLocaleString()} of ${status.ctx.toLocaleString()} tokens`;
  const texts = {
    model: status.model,
    summary: `${status.engine} · ${status.ctx.toLocaleString()} tokens of context`,
    "m-state": bytes(memory.state),
    "m-heap": bytes(memory.heap),
    "m-mapped": bytes(memory.mapped),
    "m-total": bytes(total(memory)),
    "m-planned": status.planned ? bytes(status.planned) : "–",
    "m-limit": bytes(status.limit),
    "context-text": held,
    "s-rate": last.tokens_per_second ? last.tokens_per_second.toFixed(1) : "–",
    "s-first": last.first_token_seconds ? `${last.first_token_seconds.toFixed(2)} s` : "–",
    "s-read": last.prompt_tokens ? `${last.prompt_tokens - last.reused_tokens} of ${last.prompt_tokens}` : "–",
    "s-queue": String(status.queued),
  };
  for (const [id, text] of Object.entries(texts)) set($(id), text);
  document.title = `${status.model} · edge-kv`;
  $("limit-row").hidden = !status.limit;
  $("context").value = status.used / status.ctx;
}

async function watch() {
  try {
    const response = await fetch("/status", { headers: headers() });
    if (response.ok) {
      const status = await response.json();
      samples.push(status.memory);
      if (samples.length > SAMPLES) samples.shift();
      tell(status);
      draw(status);
    } else set($("summary"), await reason(response));
  } catch {
    set($("summary"), "The server cannot be reached.");
  }
  setTimeout(watch, document.hidden ? 5000 : 1000);
}

watch();
$("input").focus();
