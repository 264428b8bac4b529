package edgekv.screen

import edgekv.core.Message
import edgekv.core.Piece
import edgekv.core.ToolCall

/** One turn of the conversation on the screen. */
data class Turn(
    val role: Role,
    val text: String = "",
    val thinking: String = "",
    /** Tools the model asked for, as text. */
    val calls: List<String> = emptyList(),
    /** What it cost and why it ended; empty while it is written. */
    val figures: String = "",
) {
    enum class Role { SYSTEM, USER, ASSISTANT, TOOL }

    fun plus(piece: Piece): Turn = when (piece.kind) {
        Piece.Kind.CONTENT -> copy(text = text + piece.text)
        Piece.Kind.THINKING -> copy(thinking = thinking + piece.text)
        Piece.Kind.CALL -> copy(calls = calls + (piece.call?.let(::written) ?: piece.text))
    }

    companion object {
        fun of(message: Message) = Turn(
            Role.valueOf(message.role.uppercase()), message.content, message.thinking, message.calls.map(::written),
        )

        private fun written(call: ToolCall) =
            "${call.name}(${call.arguments.entries.joinToString { "${it.key}: ${it.value}" }})"
    }
}

/** A conversation as text, to be copied or shared: answers without thoughts. */
fun shareable(turns: List<Turn>): String = turns.filter { it.text.isNotBlank() }.joinToString("\n\n") {
    when (it.role) {
        Turn.Role.USER -> "You: ${it.text.trim()}"
        Turn.Role.ASSISTANT -> "Model: ${it.text.trim()}"
        Turn.Role.SYSTEM -> "Instructions: ${it.text.trim()}"
        Turn.Role.TOOL -> "Tool: ${it.text.trim()}"
    }
}

/** What to do to a list of views so that it shows other turns: text that streams is appended, never set anew. */
sealed interface Change {
    /** Take away the views from `from` on. */
    data class Drop(val from: Int) : Change

    data class Add(val turn: Turn) : Change

    data class AppendText(val at: Int, val more: String) : Change

    data class AppendThinking(val at: Int, val more: String) : Change

    /** Calls and figures: short lines, set as a whole. */
    data class Annotate(val at: Int, val turn: Turn) : Change
}

/** The changes that lead from the turns shown to `wanted`. */
fun changes(shown: List<Turn>, wanted: List<Turn>): List<Change> {
    val kept = shown.zip(wanted).takeWhile { (old, new) -> grows(old, new) }.size
    val out = ArrayList<Change>()
    if (kept < shown.size) out += Change.Drop(kept)
    for (i in 0 until kept) {
        val (old, new) = Pair(shown[i], wanted[i])
        if (new.thinking.length > old.thinking.length) out += Change.AppendThinking(i, new.thinking.substring(old.thinking.length))
        if (new.text.length > old.text.length) out += Change.AppendText(i, new.text.substring(old.text.length))
        if (new.calls != old.calls || new.figures != old.figures) out += Change.Annotate(i, new)
    }
    wanted.drop(kept).forEach { out += Change.Add(it) }
    return out
}

private fun grows(old: Turn, new: Turn) =
    old.role == new.role && new.text.startsWith(old.text) && new.thinking.startsWith(old.thinking)

/** Whether a scrolled list is at its end, and so follows what is added: who scrolled back stays there. */
fun atEnd(scrolled: Int, height: Int, content: Int, slack: Int): Boolean = scrolled + height >= content - slack
