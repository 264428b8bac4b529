package edgekv.executorch

import edgekv.core.Artifact
import edgekv.core.ArtifactException
import edgekv.core.PleTable
import edgekv.core.RuntimeFault
import edgekv.core.Session
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.pytorch.executorch.EValue
import org.pytorch.executorch.ExecutorchRuntimeException
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * A portable `.pte` (`edge-kv export --backend executorch --attention portable`) on ExecuTorch's
 * own Android library. Compiled against that library's classes in CI, never run.
 *
 * Its Java `Module` gives every method memory of its own, so `prefill` and `decode` would not see
 * each other's state: prompts go through `decode` too, token by token. The state is inside the
 * program, so there are no snapshots.
 */
class ExecuTorchSession(artifact: Artifact, threads: Int) : Session(artifact) {
    override val engine = ENGINE
    override val canSnapshot get() = false
    private val ple: PleTable?
    private val module: Module
    private val ids = Tensor.allocateLongBuffer(1)
    private val position = Tensor.allocateLongBuffer(1)
    private val entry = artifact.manifest.ple
    private val layers: Int // whose per-layer rows the program takes
    private val rows: ByteBuffer

    init {
        val begin = System.nanoTime()
        val backend = artifact.backend(ENGINE)
        if (backend.details["attention"] != "portable") {
            throw ArtifactException(
                "${artifact.root.name} attends with operators that only edge-kv's own engine has; " +
                    "export with --attention portable.",
            )
        }
        val program = backend.programs[DECODE]
            ?: throw ArtifactException("${artifact.root.name} has no decode program; export again.")
        val file = artifact.program(program.file)
        layers = (program.inputs.find { it.name == PLE }?.shape?.getOrNull(1) as? Int) ?: 0
        rows = ByteBuffer.allocateDirect(4 * layers * (entry?.dim ?: 0)).order(ByteOrder.nativeOrder())
        ple = entry?.let { PleTable(artifact.file(it.file), it) }
        try {
            module = Module.load(file.path, Module.LOAD_MODE_MMAP, threads)
            module.loadMethod(DECODE)
        } catch (e: ExecutorchRuntimeException) {
            ple?.close()
            throw ArtifactException("ExecuTorch cannot load $file: ${e.message}", e)
        }
        stats.loadSeconds = (System.nanoTime() - begin) / 1e9
    }

    override fun runPrefill(ids: IntArray, pos: Int) = ids.forEachIndexed { i, id -> step(id, pos + i) }

    override fun runDecode(id: Int, pos: Int): FloatArray = step(id, pos)[0].toTensor().dataAsFloatArray

    override fun closeEngine() {
        module.close()
        ple?.close()
    }

    private fun step(id: Int, pos: Int): Array<EValue> {
        ids.put(0, id.toLong())
        position.put(0, pos.toLong())
        val one = longArrayOf(1)
        val inputs = arrayListOf(EValue.from(Tensor.fromBlob(ids, one)), EValue.from(Tensor.fromBlob(position, one)))
        if (ple != null && entry != null) {
            val values = rows.asFloatBuffer()
            ple.read(intArrayOf(id), layers, values)
            val shape = longArrayOf(1, layers.toLong(), entry.dim.toLong())
            inputs += EValue.from(Tensor.fromBlob(values, shape))
        }
        try {
            return module.execute(DECODE, *inputs.toTypedArray())
        } catch (e: ExecutorchRuntimeException) {
            throw RuntimeFault("ExecuTorch failed at position $pos: ${e.message}", e)
        }
    }

    companion object {
        const val ENGINE = "executorch"
        private const val DECODE = "decode"
        private const val PLE = "ple"
    }
}
