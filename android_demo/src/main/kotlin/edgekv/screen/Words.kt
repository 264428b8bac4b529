package edgekv.screen

import edgekv.core.ArtifactException
import edgekv.core.CancelledException
import edgekv.core.ConfigException
import edgekv.core.ContextFullException
import edgekv.core.EdgeKvException
import edgekv.core.Finish
import edgekv.core.Memory
import edgekv.core.MemoryLimitException
import edgekv.core.PromptException
import edgekv.core.Reply
import edgekv.core.SnapshotException
import java.util.Locale

/** What went wrong: in a phone's words, and as the runtime says it for whoever made the model. */
data class Problem(val text: String, val detail: String = "")

/** What the app says. Sizes are decimal, as the phone's own settings show them. */
object Words {
    /** Null for what is no problem: a stop that was asked for. */
    fun problem(e: Throwable): Problem? = when (e) {
        is CancelledException -> null
        is NotEnoughMemory -> Problem(
            "This model needs ${size(e.needed)} of memory and the phone has ${size(e.available)} free. Close other apps, " +
                "or choose a smaller model.",
        )
        is MemoryLimitException, is OutOfMemoryError -> Problem(
            "The phone ran out of memory. Close other apps, or choose a smaller model.", e.message.orEmpty(),
        )
        is ContextFullException -> Problem(
            "This conversation is longer than the model can remember. Start a new chat.", e.message.orEmpty(),
        )
        is PromptException -> Problem("The model cannot answer this.", e.message.orEmpty())
        is ConfigException -> Problem("A setting is out of range.", e.message.orEmpty())
        is ArtifactException -> Problem("This model cannot be used. Copy it to the phone again.", e.message.orEmpty())
        is SnapshotException -> Problem("The conversation could not be kept or taken up.", e.message.orEmpty())
        is UserFault -> Problem(e.message.orEmpty())
        is EdgeKvException -> Problem("Something went wrong. Try again.", e.message.orEmpty())
        else -> Problem("Something went wrong. Try again.", e.toString())
    }

    /** What one reply cost, and why it ended where it did not by itself. */
    fun figures(reply: Reply, maxNewTokens: Int): String = listOfNotNull(
        plural(reply.ids.size, "token"),
        String.format(Locale.US, "%.1f tokens/s", reply.rate).takeIf { reply.rate > 0 },
        String.format(Locale.US, "first after %.1f s", reply.firstTokenSeconds).takeIf { reply.ids.isNotEmpty() },
        "read ${number(reply.promptTokens - reply.reusedTokens)} of ${number(reply.promptTokens)}",
        ending(reply.finish, maxNewTokens),
    ).joinToString(" · ")

    private fun ending(finish: Finish, maxNewTokens: Int): String? = when (finish) {
        Finish.STOP -> null
        Finish.LENGTH -> "stopped at the limit of ${plural(maxNewTokens, "token")}"
        Finish.FULL -> "the conversation is full: start a new chat"
        Finish.CALLS -> "asks for a tool, which this app does not have"
        Finish.CANCELLED -> "stopped"
    }

    /** The meter: what this app holds, split into what has to stay and what the system may take back. */
    fun memory(now: Memory, available: Long?): String {
        fun shown(bytes: Long?) = bytes?.let(::size) ?: "–"
        val held = now.anon?.let { anon -> now.file?.let { anon + it } }
        return "Uses ${shown(held)} now, ${shown(now.peak)} at most\n" +
            "${shown(now.anon)} working memory · ${shown(now.file)} model file · ${shown(available)} free"
    }

    /** `1.2 GB`, `340 MB`, `2.4 MB`. */
    fun size(bytes: Long): String = when {
        bytes >= 1_000_000_000 -> String.format(Locale.US, "%.1f GB", bytes / 1e9)
        bytes >= 10_000_000 -> "${bytes / 1_000_000} MB"
        else -> String.format(Locale.US, "%.1f MB", bytes / 1e6)
    }

    fun number(n: Int): String = String.format(Locale.US, "%,d", n)

    fun plural(n: Int, noun: String): String = "${number(n)} $noun${if (n == 1) "" else "s"}"
}

/** The phone has less memory free than the model needs. */
class NotEnoughMemory(val needed: Long, val available: Long) : EdgeKvException("$needed bytes are needed, $available are free")

/** Something asked of the app that it cannot do now, in words for the screen. */
class UserFault(message: String) : EdgeKvException(message)
