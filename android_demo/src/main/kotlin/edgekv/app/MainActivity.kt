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
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import edgekv.core.MemoryMeter
import edgekv.screen.ScreenState
import edgekv.screen.UserFault
import edgekv.screen.Words
import edgekv.screen.atEnd
import edgekv.screen.shareable
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
    private lateinit var turns: TurnViews

    override fun onCreate(saved: Bundle?) {
        super.onCreate(saved)
        setContentView(R.layout.main)
        turns = TurnViews(this, view(R.id.turns))
        view<Button>(R.id.model).setOnClickListener { chooseModel() }
        view<Button>(R.id.settings).setOnClickListener { SettingsDialog(this, assistant).show() }
        view<Button>(R.id.fresh).setOnClickListener { assistant.newChat() }
        view<Button>(R.id.more).setOnClickListener { showMore() }
        view<Button>(R.id.send).setOnClickListener { if (assistant.busy) assistant.stop() else send() }
        view<TextView>(R.id.problem).setOnClickListener { explainProblem() }
        if (assistant.state.model == null && !assistant.busy) {
            val models = assistant.models.all()
            if (models.size == 1) assistant.load(models[0].name) else if (models.isEmpty()) app.welcome()
        }
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
        assistant.send(text)
        prompt.text.clear()
    }

    private fun chooseModel() {
        val models = assistant.models.all()
        val more = listOf(getString(R.string.import_artifact)) +
            if (models.isEmpty()) emptyList() else listOf(getString(R.string.delete_model))
        choose(R.string.choose_model, models.map { it.label } + more) { i ->
            when (i - models.size) {
                0 -> startActivityForResult(Intent(OPEN_TREE), PICK_ARTIFACT)
                1 -> choose(R.string.delete_model, models.map { it.label }) { confirmDelete(models[it].name) }
                else -> assistant.load(models[i].name)
            }
        }
    }

    private fun confirmDelete(name: String) = confirm(R.string.delete_model, getString(R.string.delete_explained, name), R.string.delete) {
        assistant.delete(name)
    }

    private fun showMore() {
        val state = assistant.state
        val idle = !assistant.busy && state.model != null
        val entries = ArrayList<Pair<Int, () -> Unit>>()
        if (idle && state.turns.isNotEmpty()) entries += R.string.again to { assistant.again() }
        if (state.turns.isNotEmpty()) entries += R.string.share_all to { share(shareable(state.turns)) }
        if (state.measurement != null) entries += R.string.save_measurement to { offerMeasurement() }
        if (idle) {
            entries += R.string.measure to {
                confirm(R.string.measure, getString(R.string.measure_explained), R.string.start) { assistant.measure(DEPTHS) }
            }
        }
        if (entries.isNotEmpty()) choose(R.string.more, entries.map { getString(it.first) }) { entries[it].second() }
    }

    private fun share(text: String) {
        val intent = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text)
        startActivity(Intent.createChooser(intent, getString(R.string.share)))
    }

    private fun explainProblem() {
        val problem = assistant.state.problem ?: return
        val text = listOf(problem.text, problem.detail).filter { it.isNotEmpty() }.joinToString("\n\n")
        AlertDialog.Builder(this).setMessage(text).setPositiveButton(android.R.string.ok, null).show()
        assistant.forgetProblem()
    }

    private fun importArtifact(tree: Uri) {
        val assistant = assistant // what runs on must not hold the screen
        val importer = ArtifactImport(app.contentResolver, assistant.models) { assistant.stopped }
        assistant.work(getString(R.string.copying)) { importer.copy(tree) }
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
                throw UserFault("The measurement could not be saved: ${e.message}.")
            }
            assistant.forgetMeasurement()
        }
    }

    private fun draw() {
        val state = assistant.state
        view<Button>(R.id.model).say(state.model ?: getString(R.string.choose_model))
        val doing = listOfNotNull(
            state.activity,
            getString(R.string.speed, state.speed).takeIf { state.speed > 0 },
            getString(R.string.context, state.position, state.ctx).takeIf { state.ctx > 0 },
        )
        view<TextView>(R.id.speed).say(doing.joinToString(" · "))
        val samples = memory.samples
        view<TextView>(R.id.memory).say(samples.lastOrNull()?.let { Words.memory(it, MemoryMeter.available()) }.orEmpty())
        view<MemoryGraph>(R.id.graph).show(samples)
        val problem = view<TextView>(R.id.problem)
        problem.say(state.problem?.text.orEmpty())
        problem.visibility = if (state.problem == null) View.GONE else View.VISIBLE
        view<Button>(R.id.send).say(getString(if (assistant.busy) R.string.stop else R.string.send))
        view<Button>(R.id.fresh).isEnabled = !assistant.busy && state.model != null
        view<Button>(R.id.settings).isEnabled = !assistant.busy
        view<Button>(R.id.model).isEnabled = !assistant.busy
        drawTurns(state)
    }

    /** Follows the text that streams, unless the reader has scrolled back. */
    private fun drawTurns(state: ScreenState) {
        val scroll = view<ScrollView>(R.id.scroll)
        val list = view<LinearLayout>(R.id.turns)
        val slack = (SLACK_DP * resources.displayMetrics.density).toInt()
        val follow = atEnd(scroll.scrollY, scroll.height, list.height, slack)
        val asked = turns.show(state.turns)
        if (asked || follow) scroll.post { scroll.scrollTo(0, list.bottom) }
    }

    /** Sets a text that is another one: screen readers announce every text that is set. */
    private fun TextView.say(wanted: String) {
        if (text.toString() != wanted) text = wanted
    }

    private fun choose(title: Int, entries: List<String>, chosen: (Int) -> Unit) {
        AlertDialog.Builder(this).setTitle(title).setItems(entries.toTypedArray()) { _, i -> chosen(i) }.show()
    }

    private fun confirm(title: Int, message: String, yes: Int, confirmed: () -> Unit) {
        AlertDialog.Builder(this)
            .setTitle(title)
            .setMessage(message)
            .setPositiveButton(yes) { _, _ -> confirmed() }
            .setNegativeButton(android.R.string.cancel, null)
            .show()
    }

    @Suppress("UNCHECKED_CAST") // the layout says which class an id is of
    private fun <T : View> view(id: Int): T = findViewById(id) as T

    private companion object {
        const val PICK_ARTIFACT = 1
        const val SAVE_MEASUREMENT = 2
        const val DRAW_MILLISECONDS = 100L
        const val SLACK_DP = 24
        val DEPTHS = listOf(2048, 8192, 32768)

        // newer than the stubs this is compiled against, older than every phone it runs on
        const val OPEN_TREE = "android.intent.action.OPEN_DOCUMENT_TREE"
        const val CREATE_DOCUMENT = "android.intent.action.CREATE_DOCUMENT"
    }
}
