package edgekv.core

import java.io.IOException

/**
 * A chat template in the conventions of Hugging Face: the part of Jinja that chat templates are
 * written in (docs/android.md lists it). What is outside it is refused when the template is read.
 */
class ChatTemplate(val source: String, private val name: String) {
    private val program: Jinja.Block = try {
        JinjaParser(source).parse()
    } catch (e: Jinja.Fault) {
        throw ArtifactException("The $name cannot be used here: ${e.message}; continue the text without roles instead.", e)
    }

    /**
     * The text of a conversation, ready for the model's next turn unless `reply` is false.
     *
     * `variables` are further names that the template may read (bos_token, enable_thinking, …).
     *
     * @throws PromptException the template refuses the conversation (roles out of order, …)
     */
    fun render(messages: List<Message>, variables: Map<String, Any?>, reply: Boolean = true): String = try {
        val names = variables + mapOf(
            "messages" to messages.map { it.asMap() }, "tools" to null, "documents" to null, "add_generation_prompt" to reply,
        )
        StringBuilder().also { program.run(Jinja.Scope(names), it) }.toString()
    } catch (e: Jinja.Fault) {
        throw PromptException("The $name refuses this conversation: ${e.message}.")
    } catch (e: StackOverflowError) {
        throw PromptException("The $name refuses this conversation: it calls itself without end.")
    } catch (e: RuntimeException) { // what is asked of a value that it cannot do
        throw PromptException("The $name refuses this conversation: it fails (${e.message ?: e.javaClass.simpleName}).")
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
