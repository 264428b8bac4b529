package edgekv.core

/** A model's wish to have a tool called. */
class ToolCall(val name: String, val arguments: Map<*, *>, val id: String)

/** One turn of a conversation, as `edge_kv.runtime.messages` has it; thinking and calls are an assistant's. */
class Message(
    val role: String,
    val content: String = "",
    val thinking: String = "",
    val calls: List<ToolCall> = emptyList(),
    private val name: String = "",
    private val callId: String = "",
) {
    /** The turn as chat templates read it, and as JSON. */
    fun asMap(): Map<String, Any?> {
        val map = linkedMapOf<String, Any?>("role" to role, "content" to content)
        if (thinking.isNotEmpty()) {
            map["thinking"] = thinking
            map["reasoning_content"] = thinking
        }
        if (calls.isNotEmpty()) {
            map["tool_calls"] = calls.map {
                val function = linkedMapOf("name" to it.name, "arguments" to it.arguments)
                linkedMapOf("id" to it.id, "type" to "function", "function" to function)
            }
        }
        if (name.isNotEmpty()) map["name"] = name
        if (callId.isNotEmpty()) map["tool_call_id"] = callId
        return map
    }

    fun with(content: String) = Message(role, content, thinking, calls, name, callId)

    companion object {
        private val ROLES = setOf("system", "user", "assistant", "tool")

        /** A turn from what `asMap` made; null where it is of another shape. */
        fun of(data: Any?): Message? {
            val map = data as? Map<*, *> ?: return null
            fun text(name: String) = map[name] ?: ""
            val role = map["role"] as? String ?: return null
            val calls = (map["tool_calls"] ?: emptyList<Any>()) as? List<*> ?: return null
            if (role !in ROLES) return null
            return Message(
                role, text("content") as? String ?: return null, text("reasoning_content") as? String ?: return null,
                calls.map { call(it) ?: return null }, text("name") as? String ?: return null,
                text("tool_call_id") as? String ?: return null,
            )
        }

        private fun call(data: Any?): ToolCall? {
            val map = data as? Map<*, *> ?: return null
            val function = map["function"] as? Map<*, *> ?: return null
            val arguments = function["arguments"] as? Map<*, *> ?: return null
            return ToolCall(function["name"] as? String ?: return null, arguments, map["id"] as? String ?: "")
        }
    }
}
