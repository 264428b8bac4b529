package edgekv.core

/** What a `tokenizer.json` may do to a text before BPE and after it; anything else is refused. */
internal object TokenizerSteps {
    fun normalizer(f: Fields?): (String) -> String = when (f?.text("type")) {
        null -> { text -> text }
        "Replace" -> replace(f)
        "Prepend" -> f.text("prepend").let { prefix -> { text -> if (text.isEmpty()) text else prefix + text } }
        "Sequence" -> chain(f.listOfFields("normalizers").map(::normalizer))
        else -> refuse("normalizer", f)
    }

    fun preTokenizer(f: Fields?): (String) -> List<String> = when (f?.text("type")) {
        null -> { text -> listOf(text) }
        "Split" -> splitAfter(f)
        "ByteLevel" -> byteLevel(f)
        else -> refuse("pre-tokenizer", f)
    }

    fun decoder(f: Fields?): (List<String>) -> String = when (f?.text("type")) {
        null -> { tokens -> tokens.joinToString(" ") }
        "ByteLevel" -> { tokens -> ByteLevel.decode(tokens) }
        "Sequence" -> {
            val steps = f.listOfFields("decoders").map(::decoderStep)
            val all: (List<String>) -> String = { tokens -> steps.fold(tokens) { t, step -> step(t) }.joinToString("") }
            all
        }
        else -> refuse("decoder", f)
    }

    private fun decoderStep(f: Fields): (List<String>) -> List<String> = when (f.text("type")) {
        "Replace" -> replace(f).let { change -> { tokens -> tokens.map(change) } }
        "ByteFallback" -> ::joinBytes
        "Fuse" -> { tokens -> listOf(tokens.joinToString("")) }
        else -> refuse("decoder", f)
    }

    private fun replace(f: Fields): (String) -> String {
        val pattern = f.fields("pattern").textOrNull("String")?.ifEmpty { null } ?: refuse("pattern", f)
        val content = f.text("content")
        return { text -> text.replace(pattern, content) }
    }

    private fun chain(steps: List<(String) -> String>): (String) -> String = { steps.fold(it) { text, step -> step(text) } }

    /** Split at a text that stays at the end of the piece before it ("MergedWithPrevious"). */
    private fun splitAfter(f: Fields): (String) -> List<String> {
        val pattern = f.fields("pattern").textOrNull("String")?.ifEmpty { null }
        val merged = f.text("behavior") == "MergedWithPrevious" && !f.flagOr("invert", false)
        if (pattern == null || !merged) refuse("pre-tokenizer", f)
        return { text ->
            val pieces = ArrayList<String>()
            var begin = 0
            while (begin < text.length) {
                val at = text.indexOf(pattern, begin)
                val end = if (at < 0) text.length else at + pattern.length
                pieces += text.substring(begin, end)
                begin = end
            }
            pieces
        }
    }

    private fun byteLevel(f: Fields): (String) -> List<String> {
        val prefix = f.flagOr("add_prefix_space", true)
        val split = f.flagOr("use_regex", true)
        return { text ->
            val whole = if (prefix && !text.startsWith(" ")) " $text" else text
            (if (split) ByteLevel.words(whole) else listOf(whole)).map(ByteLevel::encode)
        }
    }

    /** Runs of byte tokens as text; a run that is not UTF-8 becomes one U+FFFD a byte. */
    private fun joinBytes(tokens: List<String>): List<String> {
        val out = ArrayList<String>()
        val run = java.io.ByteArrayOutputStream()
        fun flush() {
            if (run.size() == 0) return
            val bytes = run.toByteArray()
            val text = String(bytes, Charsets.UTF_8)
            out += if (text.toByteArray().contentEquals(bytes)) text else "\ufffd".repeat(bytes.size)
            run.reset()
        }
        for (token in tokens) {
            val spelled = token.length == 6 && token.startsWith("<0x") && token.endsWith(">")
            val byte = if (spelled) token.substring(3, 5).toIntOrNull(16) else null
            if (byte != null) {
                run.write(byte)
            } else {
                flush()
                out += token
            }
        }
        flush()
        return out
    }

    private fun refuse(what: String, f: Fields): Nothing = throw ArtifactException(
        "tokenizer.json uses the $what '${f.textOrNull("type") ?: "?"}' in a way this app does not read; update the app.",
    )
}

/** GPT-2's byte-level text: words by a fixed pattern, every byte as a printable character. */
internal object ByteLevel {
    private val characters = CharArray(256)
    private val bytes = HashMap<Char, Int>()

    init {
        var spare = 256
        for (b in 0..255) {
            val printable = b in 0x21..0x7e || b in 0xa1..0xac || b in 0xae..0xff
            characters[b] = (if (printable) b else spare++).toChar()
            bytes[characters[b]] = b
        }
    }

    fun encode(word: String): String {
        val raw = word.toByteArray()
        return String(CharArray(raw.size) { characters[raw[it].toInt() and 255] })
    }

    fun decode(tokens: List<String>): String {
        val out = java.io.ByteArrayOutputStream()
        for (token in tokens) {
            val known = token.all { it in bytes }
            if (known) token.forEach { out.write(bytes.getValue(it)) } else out.write(token.toByteArray())
        }
        return String(out.toByteArray(), Charsets.UTF_8)
    }

    /**
     * `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`, by hand, since
     * Android's and the desktop's regular expressions know different Unicode versions.
     */
    fun words(text: String): List<String> {
        val words = ArrayList<String>()
        var at = 0
        while (at < text.length) {
            val end = wordEnd(text, at)
            words += text.substring(at, end)
            at = end
        }
        return words
    }

    private fun wordEnd(text: String, at: Int): Int {
        CONTRACTIONS.firstOrNull { text.startsWith(it, at) }?.let { return at + it.length }
        val body = if (text[at] == ' ' && at + 1 < text.length) at + 1 else at
        val kind = kind(text.codePointAt(body))
        if (kind != SPACE) return runEnd(text, body, kind)
        val end = runEnd(text, at, SPACE)
        // the last white space before a word belongs to the word
        val last = end - Character.charCount(text.codePointBefore(end))
        return if (end == text.length || last == at) end else last
    }

    private fun runEnd(text: String, from: Int, kind: Int): Int {
        var at = from
        while (at < text.length) {
            val c = text.codePointAt(at)
            if (kind(c) != kind) break
            at += Character.charCount(c)
        }
        return at
    }

    private fun kind(c: Int): Int = when {
        Character.isLetter(c) -> LETTER
        Character.getType(c).toByte() in NUMBERS -> NUMBER
        c in WHITE -> SPACE
        else -> OTHER
    }

    private val CONTRACTIONS = listOf("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    private val NUMBERS = setOf(Character.DECIMAL_DIGIT_NUMBER, Character.LETTER_NUMBER, Character.OTHER_NUMBER)
    private val WHITE = (9..13).toSet() + (0x2000..0x200a) +
        setOf(0x20, 0x85, 0xa0, 0x1680, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000)
    private const val LETTER = 0
    private const val NUMBER = 1
    private const val SPACE = 2
    private const val OTHER = 3
}
