package edgekv.screen

import edgekv.core.Artifact
import edgekv.core.Bench
import edgekv.core.Chat
import edgekv.core.ChatTemplate
import edgekv.core.EdgeKvException
import edgekv.core.Finish
import edgekv.core.Json
import edgekv.core.MemoryFit
import edgekv.core.MemoryMeter
import edgekv.core.Options
import edgekv.core.Piece
import edgekv.core.Reply
import edgekv.core.Sampling
import edgekv.core.Session
import edgekv.core.SnapshotException
import edgekv.core.Tokenizer
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors
import java.util.concurrent.Future

/** What the screen shows; replaced as a whole whenever something changes. */
data class ScreenState(
    /** Name of the loaded model; null while there is none. */
    val model: String? = null,
    val turns: List<Turn> = emptyList(),
    /** What is being done; null when nothing is. */
    val activity: String? = null,
    /** What went wrong last. */
    val problem: Problem? = null,
    /** Tokens a second of the reply that is being written, or of the last one. */
    val speed: Double = 0.0,
    val position: Int = 0,
    val ctx: Int = 0,
    /** The sampling that the loaded model recommends. */
    val sampling: Sampling = Sampling(),
    /** JSON of a finished measurement that nobody has saved yet. */
    val measurement: String? = null,
)

/** How sessions are made. */
interface Engines {
    /** @throws edgekv.core.ArtifactException no engine of this build runs the artifact */
    fun open(artifact: Artifact): Session

    /** Whether an earlier load packed the artifact's weights for this device. */
    fun isPacked(artifact: Artifact): Boolean
}

/**
 * One conversation with one artifact, on a thread of its own. It outlives the screens that show it:
 * they come and go with rotation and backgrounding, and draw `state`.
 *
 * `storage` holds the artifacts and the settings, `cache` what can be made again.
 */
class Assistant(
    storage: File,
    private val cache: File,
    private val machine: Map<String, Any?>,
    private val threads: Int,
    private val available: () -> Long? = MemoryMeter::available,
    private val engines: Engines,
) {
    @Volatile var state = ScreenState()
        private set
    val models = Models(storage)
    private val worker: ExecutorService = Executors.newSingleThreadExecutor {
        Thread(it, "edge-kv").apply { isDaemon = true }
    }
    private val conversation = File(cache, "conversation.kv")
    private val settingsFile = File(storage, "settings.json")
    @Volatile private var session: Session? = null
    private var chat: Chat? = null
    @Volatile private var stopping = false

    @Volatile var settings = Settings.read(settingsFile)
        private set

    /** Whether something runs that `stop` would end. */
    val busy get() = state.activity != null

    /** Loads a model, and takes up the conversation that was saved with it. */
    fun load(name: String) = work("Loading $name") { loadNow(name) }

    /**
     * The first start: the model that comes with the app is put into storage, loaded and asked, so that
     * a reply and what it costs can be seen at once. `open` reads the files of that model.
     */
    fun welcome(name: String, question: String, open: (String) -> InputStream) = work("Preparing $name") {
        models.addBundled(name, open)
        loadNow(name)
        ask(question, Options(maxNewTokens = WELCOME_TOKENS))
    }

    /** Asks; the reply appears in `state.turns` as it is written. */
    fun send(content: String) = work(READING) { ask(content, settings.options) }

    /** Answers the last question once more. */
    fun again() = work(READING) {
        val chat = loaded()
        val asked = state.turns.dropLastWhile { it.role == Turn.Role.ASSISTANT }
        if (asked.isEmpty()) throw UserFault("There is no question yet to answer again.")
        reply(asked, settings.options) { options, onPiece -> chat.again(options, onPiece) }
    }

    /** Forgets the conversation; the session keeps what it can reuse. */
    fun newChat() = work("Clearing") { clear() }

    /** Takes other settings; other instructions begin a new conversation. */
    fun change(wanted: Settings) {
        val before = settings
        settings = wanted
        work("Saving") {
            try {
                wanted.write(settingsFile)
            } catch (e: IOException) {
                throw UserFault("The settings count until the app is closed: they could not be kept.")
            } finally {
                if (wanted.system != before.system && chat != null) clear()
            }
        }
    }

    /** Deletes a model; the conversation with it ends. */
    fun delete(name: String) = work("Deleting $name") {
        if (state.model == name) {
            close()
            conversation.delete()
        }
        models.delete(name)
    }

    /** Measures the loaded model at real depths; the JSON lands in `state.measurement`. */
    fun measure(depths: List<Int>) = work("Measuring") {
        loaded()
        val name = state.model!!
        close() // its memory is not the measurement's
        conversation.delete()
        val artifact = fitting(name)
        val wanted = depths.filter { it < artifact.plan.ctx } + artifact.plan.ctx.coerceAtMost(depths.max())
        val bench = Bench(artifact, threads, machine, cache) { engines.open(artifact).also { session = it } }
        try {
            val document = bench.run(wanted) { state = state.copy(activity = it) }
            state = state.copy(measurement = Json.write(document))
        } finally {
            session = null
            worker.execute { load(name) }
        }
    }

    /** The measurement was saved, or is not wanted. */
    fun forgetMeasurement() {
        state = state.copy(measurement = null)
    }

    /** The problem was read. */
    fun forgetProblem() {
        state = state.copy(problem = null)
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
                session?.proceed()
                task()
                null
            } catch (e: EdgeKvException) {
                Words.problem(e)
            } catch (e: OutOfMemoryError) {
                Words.problem(e)
            } catch (e: RuntimeException) { // a fault of the app: said, and the app goes on
                Words.problem(e)
            }
            state = state.copy(activity = null, problem = problem)
        }
    }

    private fun loadNow(name: String) {
        close()
        val artifact = fitting(name)
        val tokenizer = Tokenizer.of(artifact)
        val template = ChatTemplate.of(artifact) ?: ChatTemplate.RAW
        val opened = engines.open(artifact)
        session = opened
        val made = Chat(opened, tokenizer, template)
        made.reset(settings.system)
        if (opened.canSnapshot && conversation.isFile) {
            try {
                made.load(conversation)
            } catch (e: SnapshotException) {
                conversation.delete() // of another model, or from a save that was cut off
            }
        }
        chat = made
        state = state.copy(
            model = name, turns = made.messages.map { Turn.of(it) }, position = opened.pos, ctx = artifact.plan.ctx,
            sampling = artifact.manifest.sampling,
        )
    }

    private fun ask(content: String, options: Options) {
        val chat = loaded()
        reply(state.turns + Turn(Turn.Role.USER, content), options) { given, onPiece -> chat.send(content, given, onPiece) }
    }

    /** Shows `asked` and a reply to it that grows; what was shown before comes back if there was none. */
    private fun reply(asked: List<Turn>, options: Options, answer: (Options, (Piece) -> Unit) -> Reply) {
        val session = session!!
        val before = Triple(state.turns, session.stats.decodeTokens, session.stats.decodeSeconds)
        var turn = Turn(Turn.Role.ASSISTANT)
        state = state.copy(turns = asked + turn)
        var said: Reply? = null
        try {
            said = answer(options) { piece ->
                turn = turn.plus(piece)
                val seconds = session.stats.decodeSeconds - before.third
                state = state.copy(
                    turns = asked + turn, activity = if (piece.kind == Piece.Kind.THINKING) "Thinking" else "Writing",
                    position = session.pos,
                    speed = if (seconds > 0) (session.stats.decodeTokens - before.second) / seconds else 0.0,
                )
            }
        } finally {
            val figures = said?.let { Words.figures(it, options.maxNewTokens) } ?: "broken off"
            val asIfUnasked = if (said == null) turn == Turn(turn.role) else said.finish == Finish.CANCELLED && said.ids.isEmpty()
            val shown = if (asIfUnasked) before.first else asked + turn.copy(figures = figures)
            state = state.copy(turns = shown, position = session.pos)
        }
    }

    private fun clear() {
        chat?.reset(settings.system)
        session?.reset()
        conversation.delete()
        state = state.copy(turns = chat?.messages.orEmpty().map { Turn.of(it) }, position = 0, speed = 0.0)
    }

    private fun loaded(): Chat = chat ?: throw UserFault("Choose a model first.")

    private fun fitting(name: String): Artifact = Artifact.open(models.folder(name)).also {
        val needed = MemoryFit.needed(it.manifest, engines.isPacked(it))
        val free = available()
        if (free != null && needed > free) throw NotEnoughMemory(needed, free)
    }

    private fun close() {
        session?.close()
        session = null
        chat = null
        state = ScreenState(activity = state.activity, measurement = state.measurement)
    }

    private companion object {
        const val READING = "Reading"
        const val WELCOME_TOKENS = 60
    }
}
