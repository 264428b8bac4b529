package edgekv.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.OrtSession.SessionOptions
import ai.onnxruntime.TensorInfo
import edgekv.core.Artifact
import edgekv.core.ArtifactException
import edgekv.core.EdgeKvException
import edgekv.core.KvState
import edgekv.core.MemoryLimitException
import edgekv.core.PleTable
import edgekv.core.Program
import edgekv.core.RuntimeFault
import edgekv.core.Session
import edgekv.core.Table
import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * The programs of an artifact on ONNX Runtime's CPU provider.
 *
 * State is bound in place: every table and the output of its name are the same memory, so that rows
 * are written without a copy of it. A table that grows is bound as the prefix of its live rows, so
 * that the cost of a step follows the position, not ctx.
 *
 * `cache` takes weights packed for this device, from `packFrom` bytes of them on, and for a moment
 * the files that state is mapped from.
 */
class OnnxSession(
    artifact: Artifact,
    private val cache: File,
    private val threads: Int,
    private val packFrom: Long = PackedWeights.WORTH_PACKING,
) : Session(artifact) {
    override val engine = ENGINE
    private val state = KvState(plan, cache)
    private val environment = OrtEnvironment.getEnvironment(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
    private val run = OrtSession.RunOptions()
    private val ple: PleTable?
    private val prefill: Bound
    private val decode: Bound

    init {
        val begin = System.nanoTime()
        val opened = ArrayList<Closeable>()
        try {
            ple = artifact.manifest.ple?.let { PleTable(artifact.file(it.file), it) }?.also { opened += it }
            val engines = load().onEach { opened += Closeable { it.value.close() } }
            prefill = Bound("prefill", engines, plan.chunk)
            decode = Bound(DECODE, engines, 1)
        } catch (e: Exception) {
            opened.asReversed().forEach { it.close() }
            run.close()
            throw e
        }
        stats.loadSeconds = (System.nanoTime() - begin) / 1e9
    }

    override var packed = false
        private set

    override fun state() = state

    override fun runPrefill(ids: IntArray, pos: Int) = prefill.run(ids, pos)

    override fun runDecode(id: Int, pos: Int): FloatArray {
        decode.run(intArrayOf(id), pos)
        return decode.logits
    }

    override fun interruptEngine() = run.setTerminate(true)

    override fun proceedEngine() = run.setTerminate(false)

    override fun closeEngine() {
        prefill.close()
        decode.close()
        ple?.close()
        run.close()
    }

    /** One program with its inputs and outputs bound to fixed memory. */
    private inner class Bound(private val name: String, engines: Map<String, OrtSession>, width: Int) : Closeable {
        private val program = program(name)
        private val file = artifact.file(program.file)
        private val engine = engines.getValue(name)
        private val layers = checkContract()
        private val rowValues = layers * (artifact.manifest.ple?.dim ?: 0)
        private val idsBytes = direct(8L * width)
        private val posBytes = direct(8)
        private val pleBytes = direct(4L * width * rowValues)
        private val logitsBytes = direct(if (LOGITS in engine.outputNames) 4L * artifact.manifest.tokens.vocab else 0)
        private val inputs = HashMap<String, OnnxTensor>()
        private val outputs = HashMap<String, OnnxTensor>()
        private var bound: List<Int> = emptyList() // tokens, and the live rows of every table
        val logits = FloatArray(logitsBytes.capacity() / 4)

        fun run(ids: IntArray, pos: Int) {
            ids.forEachIndexed { i, id -> idsBytes.putLong(8 * i, id.toLong()) }
            posBytes.putLong(0, pos.toLong())
            ple?.read(ids, layers, pleBytes.asFloatBuffer())
            val sizes = listOf(ids.size) + plan.tables.map { it.live(pos + ids.size) }
            try {
                if (sizes != bound) bind(sizes)
                engine.run(inputs, emptySet(), outputs, run).close()
            } catch (e: OrtException) {
                throw fault(e, RuntimeFault("onnxruntime failed in $name at position $pos: ${line(e)}", e))
            }
            if (logits.isNotEmpty()) logitsBytes.asFloatBuffer().get(logits)
        }

        override fun close() {
            unbind()
            engine.close()
        }

        private fun bind(sizes: List<Int>) {
            unbind()
            val n = sizes[0]
            inputs[IDS] = tensor(idsBytes, 8 * n, longArrayOf(n.toLong()), OnnxJavaType.INT64)
            inputs[POS] = tensor(posBytes, 8, longArrayOf(1), OnnxJavaType.INT64)
            artifact.manifest.ple?.let {
                val shape = longArrayOf(n.toLong(), layers.toLong(), it.dim.toLong())
                inputs[PLE] = tensor(pleBytes, 4 * n * rowValues, shape, OnnxJavaType.FLOAT)
            }
            val types = program.inputs.associate { it.name to TYPES.getValue(it.dtype) }
            plan.tables.forEachIndexed { i, table ->
                val rows = sizes[i + 1]
                val memory = state.slots(table, 0, rows)
                val shape = longArrayOf(rows.toLong(), table.heads.toLong(), table.dim.toLong())
                val bound = tensor(memory, memory.capacity(), shape, types.getValue(table.name))
                inputs[table.name] = bound
                outputs[table.name + OUT] = bound
            }
            if (logits.isNotEmpty()) {
                val vocab = logits.size.toLong()
                val shape = if (plan.drafts > 0) longArrayOf(1, vocab) else longArrayOf(vocab)
                outputs[LOGITS] = tensor(logitsBytes, logitsBytes.capacity(), shape, OnnxJavaType.FLOAT)
            }
            bound = sizes
        }

        private fun unbind() {
            bound = emptyList()
            (inputs.values + outputs.values).toSet().forEach { it.close() }
            inputs.clear()
            outputs.clear()
        }

        private fun tensor(bytes: ByteBuffer, size: Int, shape: LongArray, type: OnnxJavaType): OnnxTensor {
            val view = bytes.duplicate().order(ByteOrder.nativeOrder())
            view.limit(size)
            return OnnxTensor.createTensor(environment, view, shape, type)
        }

        /**
         * Compares the graph's real inputs and outputs with the manifest, and those with the plan;
         * how many layers' per-layer rows the program takes.
         */
        private fun checkContract(): Int {
            val real = (engine.inputInfo + engine.outputInfo).mapValues { (_, node) -> node.info as? TensorInfo }
            val said = (program.inputs + program.outputs).associate { it.name to TYPES[it.dtype] }
            val odd = (real.keys + said.keys).filter { real[it] == null || real[it]?.type != said[it] }.minOrNull()
            if (odd != null) {
                throw ArtifactException("$file and the manifest disagree about '$odd'; copy or export the artifact again.")
            }
            val entry = artifact.manifest.ple
            val fed = listOfNotNull(IDS, POS, PLE.takeIf { entry != null }) + plan.tables.map { it.name }
            val wanted = program.inputs.map { it.name }
            val extra = (fed - wanted.toSet() + (wanted - fed.toSet())).minOrNull()
            if (extra != null) {
                throw ArtifactException("$file does not have the inputs its plan asks for ($extra); export again.")
            }
            for (table in plan.tables) {
                val found = real.getValue(table.name)!!
                val shape = listOf(if (table.grows) OPEN else table.slots.toLong(), table.heads.toLong(), table.dim.toLong())
                if (found.shape.toList() != shape || BYTES[found.type] != Table.BYTES.getValue(table.dtype)) {
                    throw ArtifactException("$file takes '${table.name}' in another form than its plan; export again.")
                }
            }
            val vocab = artifact.manifest.tokens.vocab.toLong()
            val open = if (name == DECODE) plan.drafts > 0 else plan.chunk > 1
            val tokens = if (open) OPEN else 1L
            val forms = mutableMapOf(IDS to listOf(tokens))
            if (name == DECODE) forms[LOGITS] = if (open) listOf(tokens, vocab) else listOf(vocab)
            for ((value, form) in forms) {
                if (real[value]?.shape?.toList() != form) {
                    throw ArtifactException("$file has '$value' in another form than its plan; export again.")
                }
            }
            if (entry == null) return 0
            val shape = real.getValue(PLE)!!.shape
            if (shape.size != 3 || shape[1] !in 1..entry.layers || shape[2] != entry.dim.toLong()) {
                throw ArtifactException("$file takes per-layer rows in another form than the manifest; export again.")
            }
            if (entry.rows < artifact.manifest.tokens.vocab) {
                throw ArtifactException("${entry.file} has fewer rows than the vocabulary has tokens; export again.")
            }
            return shape[1].toInt()
        }
    }

    /** An engine for every program: packed for this device, or from the artifact itself. */
    private fun load(): Map<String, OrtSession> {
        val files = PROGRAMS.associateWith { artifact.program(program(it).file) }
        val packing = PackedWeights(artifact, File(cache, PACKED), version, packFrom) { file, settings ->
            create(file, settings).close()
        }
        packing.programs()?.let { found ->
            try {
                return createAll(found) { setOptimizationLevel(SessionOptions.OptLevel.NO_OPT) }.also { packed = true }
            } catch (e: ArtifactException) {
                packing.discard()
            }
        }
        return createAll(files) {}
    }

    private fun createAll(files: Map<String, File>, settings: SessionOptions.() -> Unit): Map<String, OrtSession> {
        val made = LinkedHashMap<String, OrtSession>()
        try {
            for (name in PROGRAMS) made[name] = create(files.getValue(name), settings)
        } catch (e: EdgeKvException) {
            made.values.forEach { it.close() }
            throw e
        }
        return made
    }

    private fun create(file: File, settings: SessionOptions.() -> Unit): OrtSession = SessionOptions().use { options ->
        try {
            options.setIntraOpNumThreads(threads)
            options.setMemoryPatternOptimization(false) // a planned arena only holds more
            options.settings()
            environment.createSession(file.path, options)
        } catch (e: OrtException) {
            throw fault(e, ArtifactException("onnxruntime cannot load $file: ${line(e)}", e))
        }
    }

    private fun program(name: String): Program = artifact.backend(ENGINE).programs[name]
        ?: throw ArtifactException("${artifact.root.name} has no $name program; export again.")

    companion object {
        const val ENGINE = "onnx"

        /** Whether the weights of `artifact` were packed for this device. */
        fun isPacked(artifact: Artifact, cache: File): Boolean =
            PackedWeights(artifact, File(cache, PACKED), version) { _, _ -> }.valid() != null

        /** Of onnxruntime's core. */
        val version: String get() = OrtEnvironment.getEnvironment().version
        private const val PACKED = "packed"
        private const val DECODE = "decode"
        private val PROGRAMS = listOf("prefill", DECODE)
        private const val IDS = "ids"
        private const val POS = "pos"
        private const val PLE = "ple"
        private const val LOGITS = "logits"
        private const val OUT = ".out"
        private const val OPEN = -1L // an axis without a size of its own
        private val TYPES = mapOf(
            "float" to OnnxJavaType.FLOAT,
            "float16" to OnnxJavaType.FLOAT16,
            "int8" to OnnxJavaType.INT8,
            "uint8" to OnnxJavaType.UINT8,
            "int64" to OnnxJavaType.INT64,
        )
        private val BYTES = mapOf(
            OnnxJavaType.FLOAT to 4, OnnxJavaType.FLOAT16 to 2, OnnxJavaType.INT8 to 1, OnnxJavaType.UINT8 to 1,
        )

        private fun direct(bytes: Long): ByteBuffer {
            if (bytes > Int.MAX_VALUE) throw ArtifactException("A step takes $bytes bytes of input; export again with a smaller --chunk.")
            return ByteBuffer.allocateDirect(bytes.toInt()).order(ByteOrder.nativeOrder())
        }

        private fun fault(e: OrtException, otherwise: EdgeKvException): EdgeKvException {
            val text = e.message.orEmpty()
            if ("allocate memory" !in text && "bad_alloc" !in text) return otherwise
            return MemoryLimitException(
                "onnxruntime ran out of memory (${line(e)}); close other apps, or export with a smaller --ctx, " +
                    "--quant int4 or --kv int8.",
                e,
            )
        }

        private fun line(e: Exception) = e.message.orEmpty().lineSequence().first().ifEmpty { e.javaClass.simpleName }
    }
}
