package edgekv.core

/** How a reply is generated; `edge_kv.runtime.generate` says what each means. */
class Options(
    val maxNewTokens: Int = 512,
    val sampling: Sampling = Sampling(),
)

/**
 * Continues `prompt` by up to `maxNewTokens` ids; a stop id ends them and is not given out.
 *
 * What the session already holds of `prompt` is kept. When the context is full the reply ends: a
 * context of ctx tokens yields at most `ctx - prompt.size + 1` ids, the last of which is not fed.
 *
 * @throws PromptException `prompt` is empty or holds something that is not a token id
 * @throws ContextFullException it does not fit the context
 * @throws CancelledException the session was cancelled
 */
fun generate(session: Session, prompt: IntArray, options: Options, stop: Set<Int>, onToken: (Int) -> Unit) {
    val sampler = Sampler(options.sampling)
    if (prompt.isEmpty()) throw PromptException("The prompt is empty; give at least one token (the start token will do).")
    if (prompt.size > session.plan.ctx) {
        throw ContextFullException(
            "The prompt has ${prompt.size} tokens, the context ${session.plan.ctx}; shorten it, start a new chat, " +
                "or export with a larger --ctx.",
        )
    }
    if (options.maxNewTokens == 0) return
    val history = IntList().apply { addAll(prompt) }
    session.feed(prompt.copyOf(prompt.size - 1))
    repeat(options.maxNewTokens) {
        if (history.size > session.plan.ctx) return
        val id = sampler.choose(session.decode(history[history.size - 1]), history::toArray)
        if (id in stop) return
        history.add(id)
        onToken(id)
    }
}
