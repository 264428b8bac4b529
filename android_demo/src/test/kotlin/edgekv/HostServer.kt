package edgekv

import edgekv.core.Artifact
import edgekv.core.Bench
import edgekv.core.Chat
import edgekv.core.ChatTemplate
import edgekv.core.EdgeKvException
import edgekv.core.Fields
import edgekv.core.IntList
import edgekv.core.Json
import edgekv.core.Memory
import edgekv.core.MemoryFit
import edgekv.core.MemoryMeter
import edgekv.core.Message
import edgekv.core.NumpyRandom
import edgekv.core.Options
import edgekv.core.Piece
import edgekv.core.PleTable
import edgekv.core.Reply
import edgekv.core.ReplyFormat
import edgekv.core.ReplyParser
import edgekv.core.Sampler
import edgekv.core.Sampling
import edgekv.core.Session
import edgekv.core.Table
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
    private val screen = ScreenServer()
    private val tokenizers = HashMap<String, Tokenizer>()

    fun answer(request: Fields): Any? = when (val op = request.text("op")) {
        "tokenize" -> tokenize(request)
        "render" -> render(request)
        "parse" -> parse(request)
        "random" -> random(request)
        "version" -> OnnxSession.version
        "sample" -> sample(request)
        "memory" -> memory(MemoryMeter.read(pss = true))
        "artifact" -> describe(Artifact.open(File(request.text("root"))), request.flagOr("digests", false))
        "rows" -> rows(request)
        "ple" -> ple(request)
        "open" -> open(request)
        "bench" -> bench(request)
        else -> if (screen.knows(op)) screen.answer(op, request) else session(op, request, session!!)
    }

    private fun memory(m: Memory) = mapOf("anon" to m.anon, "file" to m.file, "peak" to m.peak, "pss" to m.pss)

    private fun describe(artifact: Artifact, digests: Boolean): Any? {
        if (digests) artifact.checkDigests()
        val m = artifact.manifest
        return mapOf(
            "model" to m.identity.model, "plan" to m.identity.plan, "bytes" to artifact.plan.bytes, "eos" to m.tokens.eos,
            "tables" to artifact.plan.tables.map { listOf(it.name, it.slots, it.heads, it.dim) },
            "sampling" to listOf(m.sampling.temperature, m.sampling.topK, m.sampling.topP, m.sampling.minP, m.sampling.repetitionPenalty),
            "needed" to MemoryFit.needed(m, packed = false),
        )
    }

    /** The rules of one table: rows in view up to each end, rows held and resumed from at (pos, written). */
    private fun rows(request: Fields): Any? {
        val (slots, stride, keep) = request.ints("table")
        val table = Table("t", 1, 1, slots, stride, keep, "f32")
        return mapOf(
            "live" to request.ints("ends").map(table::live),
            "held" to request.list("at").map { at ->
                val (pos, written) = ints(at).toList()
                val held = table.held(pos, written)
                listOf(held.first, held.last + 1, table.canResume(pos, written))
            },
        )
    }

    private fun session(op: String, request: Fields, session: Session): Any? = when (op) {
        "prefill" -> session.prefill(ids(request, "ids")).let { state(session) }
        "decode" -> ids(request, "ids").map { floats(session.decode(it)) }
        "generate" -> generated(request, session)
        "rewind" -> session.rewind(request.int("n")).let { state(session) }
        "reset" -> session.reset().let { state(session) }
        "checkpoint" -> session.checkpoint(request.int("at")).let { state(session) }
        "resume" -> session.resume(ids(request, "ids")).let { state(session) + ("reused" to it) }
        "feed" -> session.feed(ids(request, "ids"), request.ints("at")).let { state(session) + ("reused" to it) }
        "snapshot" -> session.snapshot(File(request.text("path")), note(request)).let { state(session) }
        "restore" -> session.restore(File(request.text("path"))).let { state(session) + ("note" to it) }
        "send" -> send(session) { chat, onPiece -> chat.send(request.text("content"), options(request), onPiece) }
        "again" -> send(session) { chat, onPiece -> chat.again(options(request), onPiece) }
        "system" -> chat(session).reset(request.text("content")).let { null }
        "save" -> chat(session).save(File(request.text("path"))).let { null }
        "load" -> chat(session).also { it.load(File(request.text("path"))) }.messages.map { it.asMap() }
        "messages" -> chat(session).messages.map { it.asMap() }
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

    private fun note(request: Fields) = mapOf("by" to "kotlin") + if (request.has("note")) mapOf("note" to request.tree("note")) else emptyMap()

    private fun generated(request: Fields, session: Session): Any? {
        val out = IntList()
        val sampler = Sampler(sampling(request), seed(request))
        val (prompt, stop) = Pair(ids(request, "ids"), ids(request, "stop").toSet())
        val finish = generate(session, prompt, request.int("max_new_tokens"), sampler, stop) { out.add(it) }
        return mapOf("ids" to out.toArray().toList(), "finish" to finish.name)
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

    private fun send(session: Session, ask: (Chat, (Piece) -> Unit) -> Reply): Any? {
        val pieces = ArrayList<Any?>()
        val reply = ask(chat(session)) { pieces.add(listOf(it.kind.name.lowercase(), it.text)) }
        return mapOf(
            "text" to reply.text, "thinking" to reply.thinking, "calls" to reply.calls.map { listOf(it.name, it.arguments, it.id) },
            "ids" to reply.ids.toList(), "pieces" to pieces, "prompt" to reply.promptTokens, "reused" to reply.reusedTokens,
            "finish" to reply.finish.name.lowercase(),
        )
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
        session.proceed()
        return state(session) + mapOf("said" to said, "seconds" to seconds)
    }

    private fun tokenizer(request: Fields): Tokenizer = tokenizers.getOrPut(request.text("file")) {
        Tokenizer.read(File(request.text("file")), if (request.has("bos")) request.int("bos") else null, request.flagOr("add_bos", true))
    }

    private fun tokenize(request: Fields): Any? {
        val tokenizer = tokenizer(request)
        val start = request.flagOr("start", false)
        val special = request.flagOr("special", false)
        val encoded = request.texts("texts").map { tokenizer.encode(it, start) }
        val decode = if (request.has("decode")) request.list("decode").map { tokenizer.decode(ints(it), special) } else emptyList()
        return mapOf("ids" to encoded.map { it.toList() }, "texts" to decode)
    }

    private fun render(request: Fields): Any? {
        val messages = request.list("messages").map { Message.of(it)!! }
        val variables = mapOf("bos_token" to request.text("bos"), "eos_token" to request.text("eos")) +
            if (request.has("think")) mapOf("enable_thinking" to request.flag("think")) else emptyMap()
        return ChatTemplate(request.text("source"), "chat template").render(messages, variables)
    }

    /** What replies say: [kind, text] and, of calls, name and arguments, for each list of ids. */
    private fun parse(request: Fields): Any? {
        val format = ReplyFormat(tokenizer(request), request.text("template"))
        return request.list("replies").map { reply ->
            val parser = ReplyParser(format, request.flagOr("thinking", false))
            val pieces = ints(reply).flatMap { parser.feed(it) } + parser.end()
            pieces.map { piece -> listOf(piece.kind.name.lowercase(), piece.text) + (piece.call?.let { listOf(it.name, it.arguments) } ?: emptyList()) }
        }
    }

    private fun random(request: Fields): Any? {
        val seed = request.long("seed")
        val count = request.int("count")
        val doubles = NumpyRandom(seed).let { random -> List(count) { random.nextDouble() } }
        val integers = NumpyRandom(seed).integers(request.int("bound"), count)
        return mapOf("doubles" to doubles, "integers" to integers.toList())
    }

    private fun sample(request: Fields): Any? {
        val suppress = if (request.has("suppress")) request.ints("suppress") else emptyList()
        val sampler = Sampler(sampling(request), seed(request), suppress)
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

    private fun sampling(request: Fields): Sampling =
        if (request.has("sampling")) options(request).sampling(Sampling()) else Sampling()

    private fun seed(request: Fields): Long? =
        if (request.has("sampling")) request.fields("sampling").let { if (it.has("seed")) it.long("seed") else null } else null

    private fun ids(request: Fields, name: String): IntArray = ints(request.list(name))

    private fun floats(values: FloatArray): String {
        val out = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
        out.asFloatBuffer().put(values)
        return Base64.getEncoder().encodeToString(out.array())
    }

    private fun bytes(text: String): ByteBuffer =
        ByteBuffer.wrap(Base64.getDecoder().decode(text)).order(ByteOrder.LITTLE_ENDIAN)
}

internal fun ints(list: Any?): IntArray = (list as List<*>).map { (it as Long).toInt() }.toIntArray()

/** Options from the fields of the request's "sampling" and its other settings. */
internal fun options(request: Fields): Options {
    val f = if (request.has("sampling")) request.fields("sampling") else Fields(emptyMap<String, Any?>(), "sampling")
    fun number(name: String) = if (f.has(name)) f.double(name) else null
    return Options(
        if (request.has("max_new_tokens")) request.int("max_new_tokens") else 64, number("temperature"),
        if (f.has("top_k")) f.int("top_k") else null, number("top_p"), number("min_p"), number("repetition_penalty"),
        if (f.has("seed")) f.long("seed") else null, if (request.has("think")) request.flag("think") else null,
    )
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
        println(Json.write(answer))
    }
}
