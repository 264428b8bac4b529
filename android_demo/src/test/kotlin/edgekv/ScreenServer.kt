package edgekv

import edgekv.core.Artifact
import edgekv.core.Fields
import edgekv.core.Json
import edgekv.core.Memory
import edgekv.core.MemoryMeter
import edgekv.core.Sampling
import edgekv.onnx.OnnxSession
import edgekv.screen.Assistant
import edgekv.screen.Change
import edgekv.screen.Engines
import edgekv.screen.Settings
import edgekv.screen.SettingsForm
import edgekv.screen.Turn
import edgekv.screen.Words
import edgekv.screen.atEnd
import edgekv.screen.changes
import edgekv.screen.shareable
import java.io.File

/** What stands behind the app's screens, asked as HostServer is. */
internal class ScreenServer {
    private var assistant: Assistant? = null

    fun knows(op: String) = op in setOf("assistant", "act", "changes", "share", "settings", "words", "at_end")

    fun answer(op: String, request: Fields): Any? = when (op) {
        "assistant" -> start(request)
        "act" -> act(request, assistant!!)
        "changes" -> changes(turns(request, "shown"), turns(request, "wanted")).map(::described)
        "share" -> shareable(turns(request, "turns"))
        "settings" -> settings(request)
        "words" -> request.listOfFields("memory").map { m ->
            fun size(name: String) = if (m.has(name)) m.long(name) else null
            Words.memory(Memory(size("anon"), size("file"), size("peak"), null), size("available"))
        }
        else -> request.list("scroll").map { at -> ints(at).let { (scrolled, height, content, slack) -> atEnd(scrolled, height, content, slack) } }
    }

    private fun start(request: Fields): Any? {
        val available = if (request.has("available")) request.long("available") else MemoryMeter.available()
        val cache = File(request.text("cache"))
        val engines = object : Engines {
            override fun open(artifact: Artifact) = OnnxSession(artifact, cache, 1)

            override fun isPacked(artifact: Artifact) = OnnxSession.isPacked(artifact, cache)
        }
        val made = Assistant(File(request.text("storage")), cache, mapOf("cpu" to "host"), 1, { available }, engines)
        assistant = made
        return made.models.all().map { listOf(it.name, it.label) }
    }

    /** What a screen does; answers with what a screen shows, after the work unless `wait` is false. */
    private fun act(request: Fields, assistant: Assistant): Any? {
        when (val action = request.text("action")) {
            "load" -> assistant.load(request.text("name"))
            "welcome" -> File(request.text("from")).let { from ->
                assistant.welcome(request.text("name"), request.text("question")) { File(from, it).inputStream() }
            }
            "send" -> assistant.send(request.text("content"))
            "again" -> assistant.again()
            "new chat" -> assistant.newChat()
            "change" -> assistant.change(form(request).settings())
            "delete" -> assistant.delete(request.text("name"))
            "measure" -> assistant.measure(request.ints("depths"))
            "stop" -> assistant.stop()
            "save" -> assistant.save()?.get()
            "look" -> Unit
            else -> throw IllegalArgumentException("no such action: $action")
        }
        while (request.flagOr("wait", true) && assistant.busy) Thread.sleep(5)
        val s = assistant.state
        return mapOf(
            "model" to s.model, "turns" to s.turns.map(::described), "activity" to s.activity, "problem" to s.problem?.text,
            "detail" to s.problem?.detail, "speed" to s.speed, "position" to s.position, "ctx" to s.ctx,
            "models" to assistant.models.all().map { it.name },
            "measurement" to s.measurement?.let { Json.parse(it.toByteArray()) },
        )
    }

    /** A form as it comes back after its texts were read and written again, and what its fields hint at. */
    private fun settings(request: Fields): Any? {
        val settings = form(request).settings()
        val file = File(request.text("file"))
        settings.write(file)
        val read = Settings.read(file)
        val form = SettingsForm.of(read)
        return mapOf(
            "same" to (read == settings), "hints" to SettingsForm.hints(options(request).sampling(Sampling())),
            "texts" to listOf(
                form.system, form.temperature, form.topK, form.topP, form.minP, form.repetitionPenalty, form.maxNewTokens,
                form.think.toString(),
            ),
        )
    }

    private fun form(request: Fields): SettingsForm {
        val t = request.texts("texts")
        return SettingsForm(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7].toInt())
    }

    private fun turns(request: Fields, name: String): List<Turn> = request.listOfFields(name).map {
        Turn(Turn.Role.valueOf(it.text("role").uppercase()), it.text("text"), it.text("thinking"), it.texts("calls"), it.text("figures"))
    }

    private fun described(turn: Turn) = mapOf(
        "role" to turn.role.name.lowercase(), "text" to turn.text, "thinking" to turn.thinking, "calls" to turn.calls,
        "figures" to turn.figures,
    )

    private fun described(change: Change): List<Any?> = when (change) {
        is Change.Drop -> listOf("drop", change.from)
        is Change.Add -> listOf("add", described(change.turn))
        is Change.AppendText -> listOf("text", change.at, change.more)
        is Change.AppendThinking -> listOf("thinking", change.at, change.more)
        is Change.Annotate -> listOf("annotate", change.at, described(change.turn))
    }
}
