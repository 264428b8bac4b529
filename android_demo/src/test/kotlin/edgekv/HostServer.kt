package edgekv

import edgekv.core.Artifact
import edgekv.core.Assistant
import edgekv.core.Bench
import edgekv.core.Chat
import edgekv.core.ChatTemplate
import edgekv.core.EdgeKvException
import edgekv.core.Engines
import edgekv.core.Fields
import edgekv.core.IntList
import edgekv.core.Json
import edgekv.core.Memory
import edgekv.core.MemoryMeter
import edgekv.core.Message
import edgekv.core.NumpyRandom
import edgekv.core.Options
import edgekv.core.PleTable
import edgekv.core.Sampler
import edgekv.core.Sampling
import edgekv.core.Session
import edgekv.core.Tokenizer
import edgekv.core.generate
import edgekv.onnx.OnnxSession
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.Base64

/**
 * The app's classes in a desktop JVM, asked line by line: one JSON request in, one JSON answer out.
 * The tests that ask, and compare with Python, are tests/test_android_*.py.
 */
private class HostServer(private val scratch: File) {
    private var session: Session? = null
    private var chat: Chat? = null
    private var assistant: Assistant? = null
    private val tokenizers = HashMap<String, Tokenizer>()

    fun answer(request: Fields): Any? = when (val op = request.text("op")) {
        "tokenize" -> tokenize(request)
        "render" -> render(request)
        "random" -> random(request)
        "version" -> OnnxSession.version
        "sample" -> sample(request)
        "memory" -> memory(MemoryMeter.read(pss = true))
        "artifact" -> describe(Artifact.open(File(request.text("root"))), request.flagOr("digests", false))
        "ple" -> ple(request)
        "open" -> open(request)
        "bench" -> bench(request)
        "assistant" -> assistant(request)
        "act" -> act(request, assistant!!)
        else -> session(op, request, session ?: throw IllegalStateException("open a session first"))
    }

    private fun memory(m: Memory) = mapOf("anon" to m.anon, "file" to m.file, "peak" to m.peak, "pss" to m.pss)

    private fun describe(artifact: Artifact, digests: Boolean): Any? {
        if (digests) artifact.checkDigests()
        return mapOf(
            "fingerprint" to artifact.manifest.fingerprint, "plan" to artifact.plan.digest,
            "bytes" to artifact.plan.bytes, "views" to artifact.plan.views.map { it.name },
        )
    }

    private fun session(op: String, request: Fields, session: Session): Any? = when (op) {
        "prefill" -> session.prefill(ids(request, "ids")).let { state(session) }
        "decode" -> ids(request, "ids").map { floats(session.decode(it)) }
        "generate" -> IntList().let { out ->
            val options = Options(request.int("max_new_tokens"), sampling(request))
            generate(session, ids(request, "ids"), options, ids(request, "stop").toSet()) { out.add(it) }
            out.toArray().toList()
        }
        "rewind" -> session.rewind(request.int("n")).let { state(session) }
        "reset" -> session.reset().let { state(session) }
        "snapshot" -> session.snapshot(File(request.text("path")), mapOf("by" to "kotlin")).let { state(session) }
        "restore" -> session.restore(File(request.text("path"))).let { state(session) + ("note" to it) }
        "send" -> send(request, session)
        "save" -> chat(session).save(File(request.text("path"))).let { null }
        "load" -> chat(session).also { it.load(File(request.text("path"))) }.messages.map { listOf(it.role, it.content) }
        "cancel" -> cancel(request, session)
        "close" -> session.close().let { null }
        else -> throw IllegalArgumentException("no such request: $op")
    }

    private fun open(request: Fields): Any? {
        session?.close()
        chat = null
        val artifact = Artifact.open(File(request.text("root")))
        val threads = request.int("threads")
        val opened = if (request.has("pack_from")) {
            OnnxSession(artifact, File(request.text("cache")), threads, request.long("pack_from"))
        } else {
            OnnxSession(artifact, scratch, threads)
        }
        session = opened
        return state(opened) + ("packed" to opened.packed)
    }

    private fun assistant(request: Fields): Any? {
        val available = if (request.has("available")) request.long("available") else MemoryMeter.available()
        val cache = File(request.text("cache"))
        val engines = object : Engines {
            override fun open(artifact: Artifact) = OnnxSession(artifact, cache, 1)

            override fun isPacked(artifact: Artifact) = OnnxSession.isPacked(artifact, cache)
        }
        val made = Assistant(File(request.text("storage")), cache, mapOf("cpu" to "host"), 1, { available }, engines)
        assistant = made
        return made.models()
    }

    /** What a screen does; answers with what a screen shows, after the work unless `wait` is false. */
    private fun act(request: Fields, assistant: Assistant): Any? {
        val options = { Options(request.int("max_new_tokens")) }
        when (val action = request.text("action")) {
            "load" -> assistant.load(request.text("name"))
            "send" -> assistant.send(request.text("content"), options())
            "new chat" -> assistant.newChat()
            "measure" -> assistant.measure(request.ints("depths"))
            "stop" -> assistant.stop()
            "save" -> assistant.save()?.get()
            "look" -> Unit
            else -> throw IllegalArgumentException("no such action: $action")
        }
        while (request.flagOr("wait", true) && assistant.busy) Thread.sleep(5)
        val s = assistant.state
        return mapOf(
            "model" to s.model, "transcript" to s.transcript, "activity" to s.activity, "problem" to s.problem,
            "speed" to s.speed, "position" to s.position, "ctx" to s.ctx,
            "measurement" to s.measurement?.let { Json.parse(it.toByteArray()) },
        )
    }

    private fun state(session: Session): Map<String, Any?> =
        mapOf("pos" to session.pos, "written" to session.written, "max_rewind" to session.maxRewind)

    private fun bench(request: Fields): Any? {
        val artifact = Artifact.open(File(request.text("root")))
        val machine = mapOf("cpu" to "host", "versions" to mapOf("onnxruntime" to OnnxSession.version))
        val bench = Bench(artifact, 1, machine, scratch) { OnnxSession(artifact, scratch, 1) }
        bench.prompt = request.int("prompt")
        bench.tokens = request.int("tokens")
        bench.repeats = request.int("repeats")
        val said = ArrayList<String>()
        return mapOf("document" to bench.run(request.ints("depths")) { said += it }, "said" to said)
    }

    private fun chat(session: Session): Chat = chat ?: run {
        val template = ChatTemplate.of(session.artifact) ?: ChatTemplate.RAW
        Chat(session, Tokenizer.of(session.artifact), template).also { chat = it }
    }

    private fun send(request: Fields, session: Session): Any? {
        val pieces = ArrayList<String>()
        val options = Options(request.int("max_new_tokens"), sampling(request))
        val reply = chat(session).send(request.text("content"), options) { pieces += it }
        return mapOf("text" to reply.text, "ids" to reply.ids.toList(), "pieces" to pieces, "prompt" to reply.promptTokens)
    }

    /** Stops a prefill of `ids` from another thread, then goes on. */
    private fun cancel(request: Fields, session: Session): Any? {
        val stopper = Thread {
            Thread.sleep(request.long("after_ms"))
            session.cancel()
        }
        stopper.start()
        val begin = System.nanoTime()
        val said = try {
            session.prefill(ids(request, "ids"))
            "finished"
        } catch (e: EdgeKvException) {
            e.javaClass.simpleName
        }
        val seconds = (System.nanoTime() - begin) / 1e9
        stopper.join()
        session.resume()
        return state(session) + mapOf("said" to said, "seconds" to seconds)
    }

    private fun tokenize(request: Fields): Any? {
        val path = request.text("file")
        val tokenizer = tokenizers.getOrPut(path) {
            Tokenizer.read(File(path), request.int("bos"), request.flag("add_bos"))
        }
        val start = request.flagOr("start", false)
        val encoded = request.texts("texts").map { tokenizer.encode(it, start) }
        val decode = if (request.has("decode")) request.list("decode").map { tokenizer.decode(ints(it)) } else emptyList()
        return mapOf("ids" to encoded.map { it.toList() }, "texts" to decode)
    }

    private fun render(request: Fields): Any? {
        val messages = request.listOfFields("messages").map { Message(it.text("role"), it.text("content")) }
        return ChatTemplate(request.text("source"), "chat template").render(messages, request.text("bos"), request.text("eos"))
    }

    private fun random(request: Fields): Any? {
        val seed = request.long("seed")
        val count = request.int("count")
        val doubles = NumpyRandom(seed).let { random -> List(count) { random.nextDouble() } }
        val integers = NumpyRandom(seed).integers(request.int("bound"), count)
        return mapOf("doubles" to doubles, "integers" to integers.toList())
    }

    private fun sample(request: Fields): Any? {
        val sampler = Sampler(sampling(request))
        val logits = bytes(request.text("logits")).asFloatBuffer().let { b -> FloatArray(b.remaining()).also(b::get) }
        return List(request.int("count")) { sampler.choose(logits) { ids(request, "history") } }
    }

    private fun ple(request: Fields): Any? {
        val artifact = Artifact.open(File(request.text("root")))
        val entry = artifact.manifest.ple!!
        val ids = ids(request, "ids")
        val out = ByteBuffer.allocate(4 * ids.size * request.int("layers") * entry.dim).order(ByteOrder.LITTLE_ENDIAN)
        PleTable(artifact.file(entry.file), entry).use { it.read(ids, request.int("layers"), out.asFloatBuffer()) }
        return Base64.getEncoder().encodeToString(out.array())
    }

    private fun sampling(request: Fields): Sampling {
        val f = request.fieldsOrNull("sampling") ?: return Sampling()
        fun number(name: String, default: Double) = if (f.has(name)) f.double(name) else default
        return Sampling(
            number("temperature", 0.0), if (f.has("top_k")) f.int("top_k") else 0, number("top_p", 1.0),
            number("min_p", 0.0), number("repetition_penalty", 1.0), if (f.has("seed")) f.long("seed") else null,
        )
    }

    private fun ids(request: Fields, name: String): IntArray = ints(request.list(name))

    private fun ints(list: Any?): IntArray = (list as List<*>).map { (it as Long).toInt() }.toIntArray()

    private fun floats(values: FloatArray): String {
        val out = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
        out.asFloatBuffer().put(values)
        return Base64.getEncoder().encodeToString(out.array())
    }

    private fun bytes(text: String): ByteBuffer =
        ByteBuffer.wrap(Base64.getDecoder().decode(text)).order(ByteOrder.LITTLE_ENDIAN)
}

fun main(args: Array<String>) {
    val server = HostServer(File(args[0]))
    while (true) {
        val line = readlnOrNull() ?: return
        val answer = try {
            mapOf("result" to server.answer(Fields(Json.parse(line.toByteArray()) as Map<*, *>, "request")))
        } catch (e: EdgeKvException) {
            mapOf("error" to e.javaClass.simpleName, "message" to e.message)
        }
        println(Json.compact(answer))
    }
}
