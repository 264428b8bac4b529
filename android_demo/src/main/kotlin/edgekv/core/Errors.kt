package edgekv.core

/**
 * Every failure on purpose, shown to the user as it is: one sentence with the value, what was
 * expected and what to do. The tree is that of `edge_kv.errors`.
 */
open class EdgeKvException(message: String, cause: Throwable? = null) : Exception(message, cause)

/** An artifact directory that is missing, changed or of another version. */
class ArtifactException(message: String, cause: Throwable? = null) : EdgeKvException(message, cause)

/** A KV snapshot that belongs to another model or plan, or is cut off. */
class SnapshotException(message: String, cause: Throwable? = null) : EdgeKvException(message, cause)

/** An option out of range, or something this program does not know. */
class ConfigException(message: String) : EdgeKvException(message)

/** The runtime cannot go on. */
open class RuntimeFault(message: String, cause: Throwable? = null) : EdgeKvException(message, cause)

/** A prompt that is empty, too long or holds unknown token ids. */
class PromptException(message: String) : RuntimeFault(message)

/** The next token does not fit the exported context. */
class ContextFullException(message: String) : RuntimeFault(message)

/** The rings no longer hold the rows a rewind would need. */
class RewindException(message: String) : RuntimeFault(message)

/** The plan does not fit the memory there is. */
class MemoryLimitException(message: String, cause: Throwable? = null) : RuntimeFault(message, cause)

/** Somebody pressed stop; the session stands where the last finished step left it. */
class CancelledException : RuntimeFault("Stopped.")
