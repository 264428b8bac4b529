package edgekv.core

import java.io.File
import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors
import java.util.concurrent.Future

/** What the screen shows; replaced as a whole whenever something changes. */
data class ScreenState(
    /** Name of the loaded artifact; null while there is none. */
    val model: String? = null,
    val transcript: String = "",
    /** What is being done; null when nothing is. */
    val activity: String? = null,
    /** What went wrong last, in words. */
    val problem: String? = null,
    /** Tokens a second of the reply that is being written, or of the last one. */
    val speed: Double = 0.0,
    val position: Int = 0,
    val ctx: Int = 0,
    /** JSON of a finished measurement that nobody has saved yet. */
    val measurement: String? = null,
)

/** How sessions are made. */
interface Engines {
    /** @throws ArtifactException no engine of this build runs the artifact */
    fun open(artifact: Artifact): Session

    /** Whether an earlier load packed the artifact's weights for this device. */
    fun isPacked(artifact: Artifact): Boolean
}

/**
 * One conversation with one artifact, on a thread of its own. It outlives the screens that show it:
 * they come and go with rotation and backgrounding, and draw `state`.
 *
 * `storage` holds the artifacts, `cache` what can be made again.
 */
class Assistant(
    private val storage: File,
    private val cache: File,
    private val machine: Map<String, Any?>,
    private val threads: Int,
    private val available: () -> Long? = MemoryMeter::available,
    private val engines: Engines,
) {
    @Volatile var state = ScreenState()
        private set
    private val worker: ExecutorService = Executors.newSingleThreadExecutor {
        Thread(it, "edge-kv").apply { isDaemon = true }
    }
    private val conversation = File(cache, "conversation.kv")
    @Volatile private var session: Session? = null
    private var chat: Chat? = null
    @Volatile private var stopping = false

    /** Names of the artifacts in storage. */
    fun models(): List<String> = storage.listFiles().orEmpty()
        .filter { File(it, Manifest.FILE).isFile && !it.name.startsWith(".") }
        .map { it.name }
        .sorted()

    /** Whether something runs that `stop` would end. */
    val busy get() = state.activity != null

    /** Loads an artifact, and takes up the conversation that was saved with it. */
    fun load(name: String) = work("Loading $name") {
        close()
        val artifact = fitting(name)
        val tokenizer = Tokenizer.of(artifact)
        val template = ChatTemplate.of(artifact) ?: ChatTemplate.RAW
        val opened = engines.open(artifact)
        session = opened
        val made = Chat(opened, tokenizer, template)
        if (opened.canSnapshot && conversation.isFile) {
            try {
                made.load(conversation)
            } catch (e: SnapshotException) {
                conversation.delete() // of another model, or from a save that was cut off
            }
        }
        chat = made
        val transcript = made.messages.fold("") { text, turn -> text + shown(turn.role, turn.content, text) }
        state = state.copy(model = name, transcript = transcript, position = opened.pos, ctx = artifact.plan.ctx)
    }

    /** Asks; the reply appears in `state.transcript` as it is written. */
    fun send(content: String, options: Options) = work("Reading") {
        val chat = chat ?: throw PromptException("No model is loaded; choose one first.")
        val session = session!!
        val question = shown("user", content, state.transcript)
        state = state.copy(transcript = state.transcript + question + shown("assistant", "", question))
        val before = session.stats.decodeTokens to session.stats.decodeSeconds
        val reply = chat.send(content, options) { piece ->
            val tokens = session.stats.decodeTokens - before.first
            val seconds = session.stats.decodeSeconds - before.second
            state = state.copy(
                transcript = state.transcript + piece, activity = "Writing", position = session.pos,
                speed = if (seconds > 0) tokens / seconds else 0.0,
            )
        }
        if (reply.cancelled && reply.ids.isEmpty()) state = state.copy(transcript = state.transcript + "(stopped)")
        state = state.copy(position = session.pos)
    }

    /** Forgets the conversation; the session keeps what it can reuse. */
    fun newChat() = work("Clearing") {
        chat?.reset()
        session?.reset()
        conversation.delete()
        state = state.copy(transcript = "", position = 0, speed = 0.0)
    }

    /** Measures the loaded artifact at real depths; the JSON lands in `state.measurement`. */
    fun measure(depths: List<Int>) = work("Measuring") {
        val name = state.model ?: throw PromptException("No model is loaded; choose one first.")
        close() // its memory is not the measurement's
        conversation.delete()
        val artifact = fitting(name)
        val wanted = depths.filter { it < artifact.plan.ctx } + artifact.plan.ctx.coerceAtMost(depths.max())
        val bench = Bench(artifact, threads, machine, cache) { engines.open(artifact).also { session = it } }
        try {
            val document = bench.run(wanted) { state = state.copy(activity = it) }
            state = state.copy(measurement = Json.spaced(document))
        } finally {
            session = null
            worker.execute { load(name) }
        }
    }

    /** The measurement was saved, or is not wanted. */
    fun forgetMeasurement() {
        state = state.copy(measurement = null)
    }

    /** Ends what runs, promptly: the step that runs now is the last. */
    fun stop() {
        stopping = true
        session?.cancel()
    }

    /** Whether `stop` was called: for work that is not a session's. */
    val stopped get() = stopping

    /** Keeps the conversation for the next start; null, and nothing done, while a reply is being written. */
    fun save(): Future<*>? = if (busy) null else worker.submit {
        val saved = chat?.takeIf { session?.canSnapshot == true && session?.pos != 0 } ?: return@submit
        try {
            saved.save(conversation)
        } catch (e: EdgeKvException) {
            conversation.delete() // no room: the conversation is not worth an alarm
        }
    }

    /** Runs `task` on the worker; what goes wrong is shown in words. */
    fun work(activity: String, task: () -> Unit) {
        if (busy) return
        stopping = false
        state = state.copy(activity = activity, problem = null)
        worker.execute {
            val problem = try {
                session?.resume()
                task()
                null
            } catch (e: CancelledException) {
                null
            } catch (e: EdgeKvException) {
                e.message
            } catch (e: OutOfMemoryError) {
                "The app ran out of memory; close other apps, or export with a smaller --ctx or --quant int4."
            }
            state = state.copy(activity = null, problem = problem)
        }
    }

    private fun fitting(name: String): Artifact = Artifact.open(File(storage, name)).also {
        MemoryFit.check(it.manifest, available(), engines.isPacked(it))
    }

    private fun close() {
        session?.close()
        session = null
        chat = null
        state = ScreenState(activity = state.activity, measurement = state.measurement)
    }

    /** How a turn follows the `before` on the screen. */
    private fun shown(role: String, content: String, before: String): String =
        (if (before.isEmpty()) "" else "\n\n") + (if (role == "user") "▸ " else "") + content
}
