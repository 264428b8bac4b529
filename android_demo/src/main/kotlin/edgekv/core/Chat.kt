package edgekv.core

import java.io.File

/** One finished turn: its text, and what it cost. */
class Reply(
    val text: String,
    val ids: IntArray,
    val promptTokens: Int,
    val firstTokenSeconds: Double,
    val seconds: Double,
    val cancelled: Boolean,
)

/**
 * A conversation: history, template, streaming text.
 *
 * The ids of a turn are those of the turn before, as generated, followed by the encoding of the new
 * text only, whenever the template renders the earlier turns as before: then nothing is read twice.
 */
class Chat(private val session: Session, private val tokenizer: Tokenizer, private val template: ChatTemplate) {
    /** The turns so far. */
    var messages: List<Message> = emptyList()
        private set
    private var text = "" // the conversation as rendered, with the replies as they were generated
    private var ids = IntArray(0) // the ids of that text
    private val stop = session.model.eosIds.toSet() + session.artifact.manifest.tokenizer?.stopIds.orEmpty()

    /** Starts a new conversation; the session keeps what it can reuse. */
    fun reset() {
        messages = emptyList()
        text = ""
        ids = IntArray(0)
    }

    /**
     * Asks, and gives the reply to `onPiece` in pieces of whole characters.
     *
     * When the session is cancelled, the text so far is the reply.
     *
     * @throws PromptException the turn is empty, or the template refuses the conversation
     * @throws ContextFullException the conversation does not fit the context
     */
    fun send(content: String, options: Options, onPiece: (String) -> Unit): Reply {
        val begin = System.nanoTime()
        val asked = messages + Message("user", content)
        val eosToken = session.model.eosIds.firstOrNull()?.let(tokenizer::token) ?: ""
        val rendered = template.render(asked, tokenizer.bosToken, eosToken)
        val prompt = encode(rendered)
        val stream = TextStream(tokenizer)
        val made = IntList()
        val reply = StringBuilder()
        var first = 0.0
        fun give(piece: String) {
            if (piece.isEmpty()) return
            reply.append(piece)
            onPiece(piece)
        }
        var finished = false
        var cancelled = false
        try {
            generate(session, prompt, options, stop) { id ->
                if (made.size == 0) first = (System.nanoTime() - begin) / 1e9
                made.add(id)
                give(stream.feed(id))
            }
            finished = true
        } catch (e: CancelledException) {
            cancelled = true
        } finally {
            if (finished || made.size > 0) { // a question that failed before its reply was not asked
                if (finished) give(stream.flush())
                messages = asked + Message("assistant", reply.toString())
                text = rendered + reply
                ids = prompt + made.toArray(0, stream.done)
            }
        }
        return Reply(reply.toString(), made.toArray(), prompt.size, first, (System.nanoTime() - begin) / 1e9, cancelled)
    }

    /** Snapshots the session together with the conversation; `edge-kv run --restore` reads it too. */
    fun save(file: File) {
        val turns = messages.map { mapOf("role" to it.role, "content" to it.content) }
        session.snapshot(file, mapOf("messages" to turns, "text" to text, "ids" to ids.toList()))
    }

    /** Takes up a saved conversation; a bare session snapshot counts as text already read. */
    fun load(file: File) {
        val note = session.restore(file)
        reset()
        messages = (note["messages"] as? List<*>).orEmpty().mapNotNull { turn ->
            (turn as? Map<*, *>)?.let { Message(it["role"].toString(), it["content"].toString()) }
        }
        text = note["text"] as? String ?: ""
        ids = (note["ids"] as? List<*>)?.map { (it as Long).toInt() }?.toIntArray() ?: session.tokens
    }

    private fun encode(rendered: String): IntArray {
        if (ids.isEmpty() || !rendered.startsWith(text)) return tokenizer.encode(rendered)
        val more = rendered.substring(text.length)
        // a context restored without a conversation has its start already
        return ids + tokenizer.encode(if (text.isEmpty()) more.removePrefix(tokenizer.bosToken) else more, start = false)
    }
}
