package edgekv.app

import android.app.Activity
import android.app.AlertDialog
import android.view.View
import android.widget.EditText
import android.widget.Spinner
import edgekv.screen.Assistant
import edgekv.screen.SettingsForm
import edgekv.screen.UserFault

/** The settings: instructions, thinking, sampling. It stays open until what is in it is in range. */
class SettingsDialog(private val screen: Activity, private val assistant: Assistant) {
    private val view: View = screen.layoutInflater.inflate(R.layout.settings, null)

    fun show() {
        fill(SettingsForm.of(assistant.settings))
        val dialog = AlertDialog.Builder(screen)
            .setTitle(R.string.settings)
            .setView(view)
            .setPositiveButton(android.R.string.ok, null)
            .setNegativeButton(android.R.string.cancel, null)
            .show()
        dialog.getButton(AlertDialog.BUTTON_POSITIVE).setOnClickListener {
            try {
                assistant.change(form().settings())
                dialog.dismiss()
            } catch (e: UserFault) {
                AlertDialog.Builder(screen).setMessage(e.message).setPositiveButton(android.R.string.ok, null).show()
            }
        }
    }

    private fun fill(form: SettingsForm) {
        val numbers = listOf(R.id.temperature, R.id.top_k, R.id.top_p, R.id.min_p, R.id.repetition_penalty)
        for ((id, hint) in numbers.zip(SettingsForm.hints(assistant.state.sampling))) {
            field(id).hint = screen.getString(R.string.as_model_value, hint)
        }
        field(R.id.system).setText(form.system)
        field(R.id.temperature).setText(form.temperature)
        field(R.id.top_k).setText(form.topK)
        field(R.id.top_p).setText(form.topP)
        field(R.id.min_p).setText(form.minP)
        field(R.id.repetition_penalty).setText(form.repetitionPenalty)
        field(R.id.longest).setText(form.maxNewTokens)
        think().setSelection(form.think)
    }

    private fun form() = SettingsForm(
        text(R.id.system), text(R.id.temperature), text(R.id.top_k), text(R.id.top_p), text(R.id.min_p),
        text(R.id.repetition_penalty), text(R.id.longest), think().selectedItemPosition,
    )

    private fun text(id: Int) = field(id).text.toString()

    private fun field(id: Int) = view.findViewById(id) as EditText

    private fun think() = view.findViewById(R.id.think) as Spinner
}
