package edgekv.app

import android.app.Application
import android.os.Build
import edgekv.core.Artifact
import edgekv.core.ArtifactException
import edgekv.core.MemoryMeter
import edgekv.core.Session
import edgekv.onnx.OnnxSession
import edgekv.screen.Assistant
import edgekv.screen.Engines
import java.io.File
import java.lang.reflect.InvocationTargetException

/** Owns the assistant, which outlives every screen. */
class EdgeKvApp : Application(), Engines {
    /** Where artifacts are kept: `adb push` reaches it as Android/data/edgekv.app/files/artifacts. */
    val storage: File by lazy { File(getExternalFilesDir(null) ?: filesDir, "artifacts").apply { mkdirs() } }

    val assistant: Assistant by lazy {
        Assistant(storage, cacheDir, machine(), THREADS, engines = this)
    }

    /** The first start of the app: the model that comes in it is unpacked and asked. */
    fun welcome() {
        val before = File(filesDir, "welcomed") // a model that was deleted stays deleted
        val name = assets.list(BUNDLE).orEmpty().firstOrNull() ?: return
        if (!before.exists() && before.createNewFile()) {
            assistant.welcome(name, getString(R.string.first_question)) { assets.open("$BUNDLE/$name/$it") }
        }
    }

    override fun isPacked(artifact: Artifact) =
        OnnxSession.ENGINE in artifact.manifest.backends && OnnxSession.isPacked(artifact, cacheDir)

    override fun open(artifact: Artifact): Session {
        if (OnnxSession.ENGINE in artifact.manifest.backends) return OnnxSession(artifact, cacheDir, THREADS)
        return try {
            // by name: only builds with Google's Maven at hand hold this engine
            val type = Class.forName("edgekv.executorch.ExecuTorchSession")
            val constructor = type.getConstructor(Artifact::class.java, Int::class.javaPrimitiveType)
            constructor.newInstance(artifact, THREADS) as Session
        } catch (e: ClassNotFoundException) {
            throw ArtifactException(
                "${artifact.root.name} has no programs for onnx, and this build of the app holds no other engine; " +
                    "export again with --backend onnx.",
                e,
            )
        } catch (e: InvocationTargetException) {
            throw e.targetException
        }
    }

    private fun machine() = mapOf(
        "cpu" to Build.HARDWARE,
        "cores" to Runtime.getRuntime().availableProcessors(),
        "memory" to MemoryMeter.total(),
        "system" to "Android ${Build.VERSION.RELEASE} ${Build.MANUFACTURER} ${Build.MODEL}",
        "python" to null,
        "versions" to mapOf("onnxruntime" to OnnxSession.version),
    )

    private companion object {
        /** Assets with the one model that `build.sh` put there, where it had one. */
        const val BUNDLE = "bundle"

        /** The fast cores of a phone; more threads wait for the slow ones. */
        val THREADS = (Runtime.getRuntime().availableProcessors() / 2).coerceIn(1, 4)
    }
}
