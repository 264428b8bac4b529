package edgekv.app

import android.app.Activity
import android.content.ClipData
import android.content.ClipboardManager
import android.content.Context
import android.content.Intent
import android.view.View
import android.view.ViewGroup
import android.widget.Button
import android.widget.TextView
import android.widget.Toast
import edgekv.screen.Change
import edgekv.screen.Turn
import edgekv.screen.changes

/** The views of a conversation; text that streams is appended to them. */
class TurnViews(private val screen: Activity, private val list: ViewGroup) {
    private var shown: List<Turn> = emptyList()

    /** Shows `turns`, and says whether a question is new among them. */
    fun show(turns: List<Turn>): Boolean {
        val changes = changes(shown, turns)
        shown = turns
        for (change in changes) {
            when (change) {
                is Change.Drop -> list.removeViews(change.from, list.childCount - change.from)
                is Change.Add -> add(change.turn)
                is Change.AppendText -> text(change.at, R.id.text).append(change.more)
                is Change.AppendThinking -> {
                    text(change.at, R.id.thinking).append(change.more)
                    text(change.at, R.id.fold).visibility = View.VISIBLE
                }
                is Change.Annotate -> annotate(list.getChildAt(change.at), change.turn)
            }
        }
        return changes.any { it is Change.Add && it.turn.role == Turn.Role.USER }
    }

    private fun add(turn: Turn) {
        val view = screen.layoutInflater.inflate(R.layout.turn, list, false)
        view.text(R.id.role).setText(
            when (turn.role) {
                Turn.Role.USER -> R.string.you
                Turn.Role.ASSISTANT -> R.string.model_said
                Turn.Role.SYSTEM -> R.string.instructions
                Turn.Role.TOOL -> R.string.tool
            },
        )
        view.text(R.id.text).text = turn.text
        val thinking = view.text(R.id.thinking)
        thinking.text = turn.thinking
        val fold = view.findViewById(R.id.fold) as Button
        fold.visibility = if (turn.thinking.isEmpty()) View.GONE else View.VISIBLE
        fold.setOnClickListener {
            val open = thinking.visibility != View.VISIBLE
            thinking.visibility = if (open) View.VISIBLE else View.GONE
            fold.setText(if (open) R.string.hide_thinking else R.string.show_thinking)
        }
        view.findViewById(R.id.copy).setOnClickListener { copy(view.text(R.id.text).text) }
        view.findViewById(R.id.share).setOnClickListener { share(view.text(R.id.text).text) }
        annotate(view, turn)
        list.addView(view)
    }

    private fun annotate(view: View, turn: Turn) {
        val calls = turn.calls.map { screen.getString(R.string.asks_for, it) }
        val lines = calls + listOf(turn.figures).filter { it.isNotEmpty() }
        val figures = view.text(R.id.figures)
        figures.text = lines.joinToString("\n")
        figures.visibility = if (lines.isEmpty()) View.GONE else View.VISIBLE
        val whole = turn.role == Turn.Role.ASSISTANT && turn.figures.isNotEmpty()
        view.findViewById(R.id.actions).visibility = if (whole) View.VISIBLE else View.GONE
    }

    private fun copy(text: CharSequence) {
        val clipboard = screen.getSystemService(Context.CLIPBOARD_SERVICE) as ClipboardManager
        clipboard.setPrimaryClip(ClipData.newPlainText(screen.getString(R.string.model_said), text))
        Toast.makeText(screen, R.string.copied, Toast.LENGTH_SHORT).show()
    }

    private fun share(text: CharSequence) {
        val intent = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text.toString())
        screen.startActivity(Intent.createChooser(intent, screen.getString(R.string.share)))
    }

    private fun text(at: Int, id: Int): TextView = list.getChildAt(at).text(id)

    private fun View.text(id: Int): TextView = findViewById(id) as TextView
}
