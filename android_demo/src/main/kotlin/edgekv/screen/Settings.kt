package edgekv.screen

import edgekv.core.Fields
import edgekv.core.ArtifactException
import edgekv.core.Json
import edgekv.core.JsonException
import edgekv.core.Options
import edgekv.core.Sampling
import java.io.File
import java.io.IOException

/** What the user chose; sampling left out is the model's own. */
data class Settings(val system: String = "", val options: Options = Options()) {
    /** @throws IOException it cannot be written */
    fun write(file: File) {
        val o = options
        val map = mapOf(
            "system" to system, "max_new_tokens" to o.maxNewTokens, "temperature" to o.temperature, "top_k" to o.topK,
            "top_p" to o.topP, "min_p" to o.minP, "repetition_penalty" to o.repetitionPenalty, "think" to o.think,
        )
        val part = File(file.path + ".part")
        part.writeText(Json.write(map))
        if (!part.renameTo(file)) throw IOException("$file cannot be replaced")
    }

    companion object {
        /** What was written, or the defaults where there is nothing that can be read. */
        fun read(file: File): Settings = try {
            val f = Fields(Json.parse(file.readBytes()) as? Map<*, *> ?: emptyMap<String, Any?>(), file.name)
            fun number(name: String) = if (f.has(name)) f.double(name) else null
            val options = Options(
                f.int("max_new_tokens"), number("temperature"), if (f.has("top_k")) f.int("top_k") else null, number("top_p"),
                number("min_p"), number("repetition_penalty"), think = if (f.has("think")) f.flag("think") else null,
            )
            Settings(f.text("system"), options)
        } catch (e: IOException) {
            Settings()
        } catch (e: JsonException) {
            Settings()
        } catch (e: ArtifactException) {
            Settings()
        }
    }
}

/** One number of the settings: its label, what is allowed, and how it is read. */
class NumberField(
    val label: String,
    private val range: ClosedFloatingPointRange<Double>,
    private val whole: Boolean,
    private val allowed: String,
) {
    /** Null for an empty text: the model's own value counts. */
    fun read(text: String): Double? {
        if (text.isBlank()) return null
        val number = text.trim().replace(',', '.').toDoubleOrNull()
        if (number == null || number !in range || whole && number != Math.floor(number)) {
            throw UserFault("$label must be $allowed.")
        }
        return number
    }
}

/** The form of settings: texts as they stand in its fields. */
data class SettingsForm(
    val system: String,
    val temperature: String,
    val topK: String,
    val topP: String,
    val minP: String,
    val repetitionPenalty: String,
    val maxNewTokens: String,
    /** 0: as the model does by itself, 1: on, 2: off. */
    val think: Int,
) {
    /** @throws UserFault naming the first field that is out of range */
    fun settings() = Settings(
        system.trim(),
        Options(
            maxNewTokens = MAX_NEW_TOKENS.read(maxNewTokens)?.toInt() ?: Options().maxNewTokens,
            temperature = TEMPERATURE.read(temperature),
            topK = TOP_K.read(topK)?.toInt(),
            topP = TOP_P.read(topP),
            minP = MIN_P.read(minP),
            repetitionPenalty = REPETITION_PENALTY.read(repetitionPenalty),
            think = THINK[think],
        ),
    )

    companion object {
        val TEMPERATURE = NumberField("Temperature", 0.0..100.0, false, "a number from 0 (always the likeliest word) to 100")
        val TOP_K = NumberField("Top-k", 0.0..1e9, true, "a whole number, 0 for off")
        val TOP_P = NumberField("Top-p", Double.MIN_VALUE..1.0, false, "a number above 0 and up to 1")
        val MIN_P = NumberField("Min-p", 0.0..1.0, false, "a number from 0 to 1")
        val REPETITION_PENALTY = NumberField("Repetition penalty", Double.MIN_VALUE..100.0, false, "a number above 0, 1 for off")
        val MAX_NEW_TOKENS = NumberField("Longest reply", 1.0..1e6, true, "a whole number of tokens from 1 on")
        private val THINK = listOf(null, true, false)

        fun of(settings: Settings): SettingsForm {
            val o = settings.options
            return SettingsForm(
                settings.system, text(o.temperature), text(o.topK), text(o.topP), text(o.minP), text(o.repetitionPenalty),
                text(o.maxNewTokens), THINK.indexOf(o.think),
            )
        }

        /** What each field shows while it is empty: the model's own values, in the order of the form. */
        fun hints(model: Sampling): List<String> = listOf(
            text(model.temperature), text(model.topK), text(model.topP), text(model.minP), text(model.repetitionPenalty),
        )

        private fun text(number: Number?): String = when (number) {
            null -> ""
            is Double -> if (number == Math.rint(number)) number.toLong().toString() else number.toString()
            else -> number.toString()
        }
    }
}
