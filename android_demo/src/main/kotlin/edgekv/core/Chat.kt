package edgekv.core

import java.io.File

/** One finished turn: what was said, why it ended, and what it cost. */
class Reply(
    /** The answer alone. */
    val text: String,
    val thinking: String,
    val calls: List<ToolCall>,
    val ids: IntArray,
    val promptTokens: Int,
    /** Of those, how many the session still held. */
    val reusedTokens: Int,
    val firstTokenSeconds: Double,
    val seconds: Double,
    val finish: Finish,
) {
    /** Tokens a second behind the first. */
    val rate: Double get() = if (ids.size > 1) (ids.size - 1) / (seconds - firstTokenSeconds) else 0.0
}

/**
 * A conversation: history, template, streaming pieces; the rules are those of `edge_kv.runtime.chat`.
 *
 * The ids of a turn are those of the turn before, as generated, followed by the encoding of the new
 * text only, whenever the template renders the earlier turns as before: then nothing is read twice.
 * Where it leaves something out (thoughts), what follows is read again.
 */
class Chat(private val session: Session, private val tokenizer: Tokenizer, private val template: ChatTemplate) {
    private class Known(val text: String, val ids: IntArray)

    private class Prompt(val text: String, val ids: IntArray, val checkpoints: List<Int>, val thinking: Boolean)

    private val tokens = session.artifact.manifest.tokens
    private val format = ReplyFormat(tokenizer, template.source)
    private val stop = tokens.eos.toSet() + format.ends
    private var known: List<Known> = emptyList() // conversations and their ids, the newest last
    private val answers = object : LinkedHashMap<String, IntArray>() { // answer -> its ids as generated
        override fun removeEldestEntry(eldest: MutableMap.MutableEntry<String, IntArray>?) = size > ANSWERS
    }

    /** The turns so far, a system prompt in front where there is one. */
    var messages: List<Message> = emptyList()
        private set

    /** Starts a new conversation; the session keeps what it can reuse. */
    fun reset(system: String = "") {
        messages = if (system.isBlank()) emptyList() else listOf(Message("system", system))
        known = emptyList()
        answers.clear()
    }

    /**
     * Asks, and gives the reply to `onPiece` in pieces of whole characters. When the session is
     * cancelled, what was said so far is the reply.
     *
     * @throws PromptException the turn is empty, or the template refuses the conversation
     * @throws ContextFullException the conversation does not fit the context
     */
    fun send(content: String, options: Options, onPiece: (Piece) -> Unit): Reply =
        answer(messages + Message("user", content), options, onPiece)

    /**
     * Answers the last question once more; the reply there was is forgotten.
     *
     * @throws PromptException nothing was asked yet; and as `send`
     */
    fun again(options: Options, onPiece: (Piece) -> Unit): Reply {
        val last = messages.indexOfLast { it.role != "assistant" }
        if (last < 0 || messages[last].role == "system") throw PromptException("There is no question yet to answer again.")
        return answer(messages.take(last + 1), options, onPiece)
    }

    /** Snapshots the session together with the conversation; `edge-kv run --restore` reads it too. */
    fun save(file: File) {
        val newest = known.lastOrNull()
        if (newest == null) session.reset() // what is held belongs to an earlier conversation
        session.snapshot(
            file,
            mapOf(
                "messages" to messages.map { it.asMap() }, "text" to newest?.text.orEmpty(),
                "ids" to newest?.ids.orEmpty().toList(), "gap" to listOf(0, 0),
            ),
        )
    }

    /**
     * Takes up a saved conversation; a bare session snapshot counts as text already read.
     *
     * @throws SnapshotException it cannot be restored here, or holds another kind of note
     */
    fun load(file: File) {
        val note = session.restore(file)
        reset()
        val turns = note["messages"] ?: emptyList<Any>()
        val text = note["text"] ?: ""
        val ids = note["ids"] ?: session.tokens.map { it.toLong() }
        messages = (turns as? List<*>)?.map { Message.of(it) }?.takeIf { null !in it }?.filterNotNull() ?: damaged(file)
        val all = (ids as? List<*>)?.map { (it as? Long)?.toInt() ?: damaged(file) } ?: damaged(file)
        if (all.isNotEmpty()) remember(text as? String ?: damaged(file), all.toIntArray())
    }

    private fun damaged(file: File): Nothing =
        throw SnapshotException("$file holds a conversation that is damaged; take it again.")

    private fun answer(asked: List<Message>, options: Options, onPiece: (Piece) -> Unit): Reply {
        val begin = System.nanoTime()
        fun elapsed() = (System.nanoTime() - begin) / 1e9
        val prompt = prompt(asked, options)
        val sampler = Sampler(options.sampling(session.artifact.manifest.sampling), options.seed, tokens.suppress)
        val parser = ReplyParser(format, prompt.thinking)
        val made = IntList()
        val content = StringBuilder()
        val thinking = StringBuilder()
        val calls = ArrayList<ToolCall>()
        fun keep(pieces: List<Piece>) = pieces.filter { it.call != null || it.text.isNotEmpty() }.forEach { piece ->
            when (piece.kind) {
                Piece.Kind.CONTENT -> content.append(piece.text)
                Piece.Kind.THINKING -> thinking.append(piece.text)
                Piece.Kind.CALL -> piece.call?.let(calls::add)
            }
            onPiece(piece)
        }
        var first = 0.0
        var reused = 0
        var finish: Finish? = null
        try {
            finish = generate(session, prompt.ids, options.maxNewTokens, sampler, stop, prompt.checkpoints, { reused = it }) { id ->
                if (made.size == 0) first = elapsed()
                made.add(id)
                keep(parser.feed(id))
            }
            keep(parser.end())
            if (finish == Finish.STOP && calls.isNotEmpty()) finish = Finish.CALLS
        } catch (e: CancelledException) {
            finish = Finish.CANCELLED
        } finally {
            if (made.size > 0 || finish != null && finish != Finish.CANCELLED) { // else the question was not asked
                val answer = if (calls.isEmpty()) content.toString() else content.toString().trimEnd(Jinja::isSpace)
                messages = asked + Message("assistant", answer, thinking.toString(), calls)
                keepIds(prompt, made.toArray(), content.toString().takeIf { calls.isEmpty() }.orEmpty())
            }
        }
        val answer = if (calls.isEmpty()) content.toString() else content.toString().trimEnd(Jinja::isSpace)
        return Reply(
            answer, thinking.toString(), calls, made.toArray(), prompt.ids.size, reused, first, elapsed(), finish,
        )
    }

    private fun prompt(asked: List<Message>, options: Options): Prompt {
        val text = render(asked, options)
        val ids = encode(asked, options, text)
        val (turn, opening) = cut(text, ids, staying(asked, options, text))
        val head = head(asked, text)
        val checkpoints = listOf(if (head > 1) head else 0, minOf(turn, ids.size - 1))
        return Prompt(text, ids, checkpoints, format.opened(opening))
    }

    private fun render(turns: List<Message>, options: Options, reply: Boolean = true): String {
        val eos = tokens.eos.firstOrNull()?.let(tokenizer::token).orEmpty()
        val variables = mapOf("bos_token" to tokenizer.bosToken, "eos_token" to eos)
        return template.render(turns, if (options.think == null) variables else variables + ("enable_thinking" to options.think), reply)
    }

    /**
     * How many characters of a prompt the history of later turns is sure to begin with. Templates open
     * thoughts that history leaves out: the conversation is rendered as if it had gone on.
     */
    private fun staying(asked: List<Message>, options: Options, text: String): Int {
        val later = try {
            listOf(render(asked + Message("assistant", "a") + Message("user", "a"), options))
        } catch (e: PromptException) { // a template that wants its turns in another order
            emptyList()
        }
        return (later + render(asked, options, reply = false)).minOf { it.commonPrefixWith(text).length }
    }

    /**
     * How many ids stand for the first `at` characters of a prompt, and the ids behind them. Where `at`
     * lies inside a token, the cut moves left to where a line or a mark begins.
     */
    private fun cut(text: String, ids: IntArray, at: Int): Pair<Int, IntArray> {
        val places = listOf(at, text.lastIndexOf('<', at - 1), text.lastIndexOf('\n', at - 1) + 1)
        for (place in places) {
            val rest = tokenizer.encode(text.substring(maxOf(place, 0)), start = false)
            if (rest.size <= ids.size && ids.copyOfRange(ids.size - rest.size, ids.size).contentEquals(rest)) {
                return Pair(ids.size - rest.size, rest)
            }
        }
        return Pair(0, tokenizer.encode(text.substring(at), start = false))
    }

    /** Ids of a rendered conversation, earlier turns as they were read and generated. */
    private fun encode(turns: List<Message>, options: Options, text: String): IntArray {
        val known = known.filter { text.startsWith(it.text) }.maxByOrNull { it.text.length }
        val ids = IntList().apply { addAll(known?.ids ?: IntArray(0)) }
        var at = known?.text?.length ?: 0
        var start = ids.size == 0
        // a context restored without a conversation has its start already
        if (known != null && at == 0 && text.startsWith(tokenizer.bosToken)) at = tokenizer.bosToken.length
        for ((begin, end, answer) in places(turns, options, text, at)) {
            ids.addAll(tokenizer.encode(text.substring(at, begin), start))
            ids.addAll(answer)
            at = end
            start = false
        }
        if (at < text.length || start) ids.addAll(tokenizer.encode(text.substring(at), start))
        return ids.toArray()
    }

    /**
     * Where answers whose ids are known stand in `text` from `at` on; none if that is unsure. The
     * conversation is rendered once more with a mark instead of each such answer.
     */
    private fun places(turns: List<Message>, options: Options, text: String, at: Int): List<Triple<Int, Int, IntArray>> {
        val said = turns.indices.filter { turns[it].role == "assistant" && turns[it].content in answers }
        if (said.isEmpty() || at >= text.length) return emptyList()
        fun hole(i: Int) = "\ue000$i\ue001"
        var rest = render(turns.mapIndexed { i, turn -> if (i in said) turn.with(hole(i)) else turn }, options)
        val places = ArrayList<Triple<Int, Int, IntArray>>()
        val made = StringBuilder()
        for (i in said) {
            if (hole(i) !in rest) return emptyList()
            made.append(rest.substringBefore(hole(i)))
            rest = rest.substringAfter(hole(i))
            val begin = made.length
            made.append(turns[i].content)
            if (begin >= at) places += Triple(begin, made.length, answers.getValue(turns[i].content))
        }
        return if (made.append(rest).contentEquals(text)) places else emptyList()
    }

    /** Tokens up to the end of the system prompt. */
    private fun head(turns: List<Message>, text: String): Int {
        val system = turns.firstOrNull()?.takeIf { it.role == "system" }?.content?.trim(Jinja::isSpace).orEmpty()
        val at = if (system.isEmpty()) -1 else text.indexOf(system)
        return if (at < 0) 1 else minOf(tokenizer.encode(text.take(at + system.length)).size, session.plan.ctx / 2)
    }

    private fun keepIds(prompt: Prompt, made: IntArray, answer: String) {
        val stream = TextStream(tokenizer)
        made.forEach(stream::feed)
        val whole = made.copyOf(stream.done)
        remember(prompt.text + tokenizer.decode(whole, special = true), prompt.ids + whole)
        val ids = answerIds(whole, answer)
        if (ids.isEmpty()) return
        answers.remove(answer) // the newest last
        answers[answer] = ids
    }

    /** The ids at the end of a reply that are exactly its answer; none if there are none. */
    private fun answerIds(whole: IntArray, answer: String): IntArray {
        if (answer.isEmpty()) return IntArray(0)
        for (at in whole.indexOfLast { it in format.marks } + 1 until whole.size) {
            val text = tokenizer.decode(whole.copyOfRange(at, whole.size))
            if (text == answer) return whole.copyOfRange(at, whole.size)
            if (text.length < answer.length) break
        }
        return IntArray(0)
    }

    private fun remember(text: String, ids: IntArray) {
        known = known.filterNot { text.startsWith(it.text) }.takeLast(CONVERSATIONS - 1) + Known(text, ids)
    }

    private fun IntArray?.orEmpty() = this ?: IntArray(0)

    private companion object {
        const val CONVERSATIONS = 8
        const val ANSWERS = 512
    }
}
