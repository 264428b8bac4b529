package edgekv.app

import android.app.Activity
import android.app.AlertDialog
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.os.Handler
import android.os.Looper
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.ScrollView
import android.widget.TextView
import edgekv.core.ArtifactException
import edgekv.core.Memory
import edgekv.core.MemoryFit
import edgekv.core.MemoryMeter
import edgekv.core.Options
import java.io.IOException

/**
 * The one screen. It keeps nothing: the assistant lives in the application, and what it says is
 * drawn a few times a second while the screen is visible.
 */
class MainActivity : Activity() {
    private val app get() = application as EdgeKvApp
    private val assistant get() = app.assistant
    private val ticker = Handler(Looper.getMainLooper())
    private val memory = MemorySampler()
    private var shownTranscript: String? = null

    override fun onCreate(saved: Bundle?) {
        super.onCreate(saved)
        setContentView(R.layout.main)
        view<Button>(R.id.model).setOnClickListener { chooseModel() }
        view<Button>(R.id.fresh).setOnClickListener { assistant.newChat() }
        view<Button>(R.id.measure).setOnClickListener {
            if (assistant.state.measurement == null) confirmMeasurement() else offerMeasurement()
        }
        view<Button>(R.id.send).setOnClickListener { if (assistant.busy) assistant.stop() else send() }
        assistant.models().singleOrNull()?.let { if (assistant.state.model == null) assistant.load(it) }
    }

    override fun onStart() {
        super.onStart()
        memory.start()
        ticker.post(object : Runnable {
            override fun run() {
                draw()
                ticker.postDelayed(this, DRAW_MILLISECONDS)
            }
        })
    }

    override fun onStop() {
        ticker.removeCallbacksAndMessages(null)
        memory.stop()
        assistant.save() // the system may end the process from here on
        super.onStop()
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val uri = data?.data
        if (result != RESULT_OK || uri == null) return
        when (request) {
            PICK_ARTIFACT -> importArtifact(uri)
            SAVE_MEASUREMENT -> saveMeasurement(uri)
        }
    }

    private fun send() {
        val prompt = view<EditText>(R.id.prompt)
        val text = prompt.text.toString()
        if (text.isBlank() || assistant.state.model == null) return
        assistant.send(text, Options(maxNewTokens = MAX_NEW_TOKENS))
        prompt.text.clear()
    }

    private fun chooseModel() {
        val models = assistant.models()
        val entries = models + getString(R.string.import_artifact)
        AlertDialog.Builder(this)
            .setTitle(R.string.choose_model)
            .setItems(entries.toTypedArray()) { _, i ->
                if (i < models.size) assistant.load(models[i])
                else startActivityForResult(Intent(OPEN_TREE), PICK_ARTIFACT)
            }
            .show()
    }

    private fun importArtifact(tree: Uri) {
        val assistant = assistant // what runs on must not hold the screen
        val importer = ArtifactImport(app.contentResolver, app.storage) { assistant.stopped }
        assistant.work(getString(R.string.copying)) { importer.copy(tree) }
    }

    private fun confirmMeasurement() {
        AlertDialog.Builder(this)
            .setTitle(R.string.measure)
            .setMessage(R.string.measure_explained)
            .setPositiveButton(R.string.measure) { _, _ -> assistant.measure(DEPTHS) }
            .setNegativeButton(android.R.string.cancel, null)
            .show()
    }

    private fun offerMeasurement() {
        val intent = Intent(CREATE_DOCUMENT).setType("application/json").addCategory(Intent.CATEGORY_OPENABLE)
        startActivityForResult(intent.putExtra(Intent.EXTRA_TITLE, "edge-kv-bench.json"), SAVE_MEASUREMENT)
    }

    private fun saveMeasurement(uri: Uri) {
        val (assistant, resolver) = Pair(assistant, app.contentResolver) // what runs on must not hold the screen
        val json = assistant.state.measurement ?: return
        assistant.work(getString(R.string.saving)) {
            try {
                val output = resolver.openOutputStream(uri) ?: throw IOException("no such place")
                output.use { it.write(json.toByteArray()) }
            } catch (e: IOException) {
                throw ArtifactException("Cannot save the measurement: ${e.message}.", e)
            }
            assistant.forgetMeasurement()
        }
    }

    private fun draw() {
        val state = assistant.state
        view<Button>(R.id.model).text = state.model ?: getString(R.string.choose_model)
        view<TextView>(R.id.speed).text = listOfNotNull(
            state.activity,
            getString(R.string.speed, state.speed).takeIf { state.speed > 0 },
            getString(R.string.context, state.position, state.ctx).takeIf { state.ctx > 0 },
        ).joinToString(" · ")
        val samples = memory.samples
        view<TextView>(R.id.memory).text = samples.lastOrNull()?.let(::memoryLine).orEmpty()
        view<MemoryGraph>(R.id.graph).show(samples)
        val problem = view<TextView>(R.id.problem)
        problem.text = state.problem
        problem.visibility = if (state.problem == null) View.GONE else View.VISIBLE
        view<Button>(R.id.send).setText(if (assistant.busy) R.string.stop else R.string.send)
        view<Button>(R.id.fresh).isEnabled = !assistant.busy && state.model != null
        val measure = view<Button>(R.id.measure)
        measure.isEnabled = !assistant.busy && state.model != null
        measure.setText(if (state.measurement == null) R.string.measure else R.string.save_measurement)
        drawTranscript(state.transcript)
    }

    private fun drawTranscript(transcript: String) {
        if (transcript == shownTranscript) return
        shownTranscript = transcript
        view<TextView>(R.id.transcript).text = transcript
        val scroll = view<ScrollView>(R.id.scroll)
        scroll.post { scroll.fullScroll(View.FOCUS_DOWN) }
    }

    private fun memoryLine(now: Memory): String {
        fun megabytes(bytes: Long?) = bytes?.let(MemoryFit::megabytes) ?: "–"
        return getString(
            R.string.memory, megabytes(now.pss), megabytes(now.peak), megabytes(now.anon), megabytes(now.file),
            megabytes(MemoryMeter.available()),
        )
    }

    @Suppress("UNCHECKED_CAST") // the layout says which class an id is of
    private fun <T : View> view(id: Int): T = findViewById(id) as T

    private companion object {
        const val PICK_ARTIFACT = 1
        const val SAVE_MEASUREMENT = 2
        const val DRAW_MILLISECONDS = 100L
        const val MAX_NEW_TOKENS = 1024
        val DEPTHS = listOf(2048, 8192, 32768)

        // newer than the stubs this is compiled against, older than every phone it runs on
        const val OPEN_TREE = "android.intent.action.OPEN_DOCUMENT_TREE"
        const val CREATE_DOCUMENT = "android.intent.action.CREATE_DOCUMENT"
    }
}
