package edgekv.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
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
import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * The programs of an artifact on ONNX Runtime's CPU provider.
 *
 * State is bound in place: every state input and its output are the same memory, so TensorScatter
 * writes rows without copying a buffer. Append buffers are bound one head at a time as a prefix of
 * `plan.liveRows(end)` rows, so that the cost of a step follows the live length, not ctx.
 */
class OnnxSession(artifact: Artifact, scratch: File, threads: Int) : Session(artifact) {
    override val engine = ENGINE
    private val state = KvState(plan, scratch)
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
            prefill = Bound("prefill", threads, plan.chunk, model.owning).also { opened += it }
            decode = Bound("decode", threads, 1, model.layers).also { opened += it }
        } catch (e: Exception) {
            opened.asReversed().forEach { it.close() }
            run.close()
            throw e
        }
        stats.loadSeconds = (System.nanoTime() - begin) / 1e9
    }

    override fun state() = state

    override fun runPrefill(ids: IntArray, pos: Int) = prefill.run(ids, pos)

    override fun runDecode(id: Int, pos: Int): FloatArray {
        decode.run(intArrayOf(id), pos)
        return decode.logits
    }

    override fun interruptEngine() = run.setTerminate(true)

    override fun resumeEngine() = run.setTerminate(false)

    override fun closeEngine() {
        prefill.close()
        decode.close()
        ple?.close()
        run.close()
    }

    /** One program with its inputs and outputs bound to fixed memory. */
    private inner class Bound(private val name: String, threads: Int, width: Int, private val layers: Int) : Closeable {
        private val program = artifact.backend(ENGINE).programs[name]
            ?: throw ArtifactException("${artifact.root.name} has no $name program; export again.")
        private val file = artifact.file(program.file)
        private val engine = load(file, threads)
        private val idsBytes = direct(8 * width)
        private val posBytes = direct(8)
        private val pleBytes = direct(4 * width * layers * model.pleDim)
        private val logitsBytes = direct(4 * model.vocabSize)
        private val inputs = HashMap<String, OnnxTensor>()
        private val outputs = HashMap<String, OnnxTensor>()
        private var bound: Pair<Int, Int>? = null
        val logits = FloatArray(model.vocabSize)

        init {
            try {
                checkContract()
            } catch (e: Exception) {
                close()
                throw e
            }
        }

        fun run(ids: IntArray, pos: Int) {
            ids.forEachIndexed { i, id -> idsBytes.putLong(8 * i, id.toLong()) }
            posBytes.putLong(0, pos.toLong())
            ple?.read(ids, layers, pleBytes.asFloatBuffer())
            val shape = Pair(ids.size, plan.liveRows(pos + ids.size))
            try {
                if (shape != bound) bind(shape.first, shape.second)
                engine.run(inputs, emptySet(), outputs, run).close()
            } catch (e: OrtException) {
                throw fault(e, RuntimeFault("onnxruntime failed in $name at position $pos: ${line(e)}", e))
            }
            if (LOGITS in outputs) logitsBytes.asFloatBuffer().get(logits)
        }

        override fun close() {
            unbind()
            engine.close()
        }

        private fun bind(n: Int, live: Int) {
            unbind()
            inputs["ids"] = tensor(idsBytes, 8 * n, longArrayOf(n.toLong()), OnnxJavaType.INT64)
            inputs["pos"] = tensor(posBytes, 8, longArrayOf(1), OnnxJavaType.INT64)
            if (ple != null) {
                val sizes = longArrayOf(n.toLong(), layers.toLong(), model.pleDim.toLong())
                inputs["ple"] = tensor(pleBytes, 4 * n * layers * model.pleDim, sizes, OnnxJavaType.FLOAT)
            }
            val types = program.inputs.associate { it.name to TYPES.getValue(it.dtype) }
            for (view in plan.views) {
                val bytes = state.bytes(view, live)
                val bound = tensor(bytes, bytes.capacity(), view.shape(live), types.getValue(view.name))
                inputs[view.name] = bound
                outputs["${view.name}.out"] = bound
            }
            if (program.outputs.any { it.name == LOGITS }) {
                val sizes = longArrayOf(model.vocabSize.toLong())
                outputs[LOGITS] = tensor(logitsBytes, logitsBytes.capacity(), sizes, OnnxJavaType.FLOAT)
            }
            bound = Pair(n, live)
        }

        private fun unbind() {
            bound = null
            (inputs.values + outputs.values).toSet().forEach { it.close() }
            inputs.clear()
            outputs.clear()
        }

        private fun tensor(bytes: ByteBuffer, size: Int, shape: LongArray, type: OnnxJavaType): OnnxTensor {
            val view = bytes.duplicate().order(ByteOrder.nativeOrder())
            view.limit(size)
            return OnnxTensor.createTensor(environment, view, shape, type)
        }

        /** Compares the graph's real inputs and outputs with the manifest, and those with the plan. */
        private fun checkContract() {
            val real = (engine.inputInfo + engine.outputInfo).mapValues { (_, node) -> (node.info as? TensorInfo)?.type }
            val said = (program.inputs + program.outputs).associate { it.name to TYPES[it.dtype] }
            val odd = (real.keys + said.keys).filter { real[it] == null || real[it] != said[it] }.minOrNull()
            if (odd != null) {
                throw ArtifactException("$file and the manifest disagree about '$odd'; copy or export the artifact again.")
            }
            val fed = listOfNotNull("ids", "pos", "ple".takeIf { ple != null }) + plan.views.map { it.name }
            val wanted = program.inputs.map { it.name }
            val extra = (fed - wanted.toSet() + (wanted - fed.toSet())).minOrNull()
            if (extra != null) {
                throw ArtifactException("$file does not have the inputs its KV plan asks for ($extra); export again.")
            }
        }
    }

    private fun load(file: File, threads: Int): OrtSession {
        OrtSession.SessionOptions().use { options ->
            options.setIntraOpNumThreads(threads)
            options.setMemoryPatternOptimization(false) // a planned arena only holds more
            try {
                return environment.createSession(file.path, options)
            } catch (e: OrtException) {
                throw fault(e, ArtifactException("onnxruntime cannot load $file: ${line(e)}", e))
            }
        }
    }

    companion object {
        const val ENGINE = "onnx"
        private const val LOGITS = "logits"
        private val TYPES = mapOf(
            "float" to OnnxJavaType.FLOAT,
            "float16" to OnnxJavaType.FLOAT16,
            "int8" to OnnxJavaType.INT8,
            "uint8" to OnnxJavaType.UINT8,
            "int64" to OnnxJavaType.INT64,
        )

        private fun direct(bytes: Int) = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

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
