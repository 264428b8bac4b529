package edgekv.core

import java.io.IOException

/** One turn of a conversation. */
class Message(val role: String, val content: String)

/**
 * A chat template in the conventions of Hugging Face: the part of Jinja that chat templates are
 * written in (docs/android.md lists it). What is outside it is refused when the template is read.
 */
class ChatTemplate(source: String, private val name: String) {
    private val program: Jinja.Block = try {
        JinjaParser(source).parse()
    } catch (e: Jinja.Fault) {
        throw ArtifactException("The $name cannot be used here: ${e.message}; continue the text without roles instead.", e)
    }

    /**
     * The text of a conversation, ready for the model's next turn.
     *
     * @throws PromptException the template refuses the conversation (roles out of order, …)
     */
    fun render(messages: List<Message>, bosToken: String, eosToken: String): String = try {
        val turns = messages.map { mapOf("role" to it.role, "content" to it.content) }
        val variables = mapOf(
            "messages" to turns, "add_generation_prompt" to true, "bos_token" to bosToken, "eos_token" to eosToken,
        )
        StringBuilder().also { program.run(Jinja.Scope(variables), it) }.toString()
    } catch (e: Jinja.Fault) {
        throw PromptException("The $name refuses this conversation: ${e.message}.")
    }

    companion object {
        /** No roles and no marks: the model continues the text of all turns. */
        val RAW get() = ChatTemplate("{% for message in messages %}{{ message['content'] }}{% endfor %}", "raw template")

        /** The template of an artifact; null when it has none (a base model). */
        fun of(artifact: Artifact): ChatTemplate? {
            val file = artifact.file(artifact.manifest.tokenizer?.chatTemplate ?: return null)
            try {
                return ChatTemplate(file.readText(), file.name)
            } catch (e: IOException) {
                throw ArtifactException("Cannot read the chat template $file: ${e.message}.", e)
            }
        }
    }
}
