package edgekv.core

/** A piece of a template: text, the start or end of a tag, or a word inside one. */
internal class JinjaToken(val kind: Kind, val text: String, val line: Int) {
    enum class Kind { TEXT, PRINT, STATEMENT, CLOSE, NAME, STRING, INTEGER, FLOAT, SYMBOL, END }
}

/**
 * Cuts a template into tokens, with the white space rules of Hugging Face's environment:
 * `trim_blocks`, `lstrip_blocks`, and `-` and `+` at the edges of a tag.
 */
internal class JinjaLexer(source: String) {
    private val source = source.replace("\r\n", "\n").replace('\r', '\n').removeSuffix("\n")
    private val tokens = ArrayList<JinjaToken>()
    private var at = 0
    private var lineStart = true // whether the text at `at` begins a line

    fun tokens(): List<JinjaToken> {
        while (at < source.length) {
            val open = OPEN.find(source, at)
            if (open == null) {
                emit(JinjaToken.Kind.TEXT, source.substring(at))
                at = source.length
                break
            }
            addText(source.substring(at, open.range.first), open.value)
            at = open.range.last + 1
            when (open.value[1]) {
                '#' -> skipComment()
                '{' -> readTag(JinjaToken.Kind.PRINT, "}}")
                else -> readTag(JinjaToken.Kind.STATEMENT, "%}")
            }
        }
        emit(JinjaToken.Kind.END, "")
        return tokens
    }

    private fun addText(raw: String, open: String) {
        val lineBegin = raw.lastIndexOf('\n') + 1
        val indent = raw.substring(lineBegin)
        val text = when {
            open.endsWith('-') -> raw.trimEnd(Jinja::isSpace)
            open.endsWith('+') || open[1] == '{' -> raw
            (lineBegin > 0 || lineStart) && indent.all(Jinja::isSpace) -> raw.substring(0, lineBegin)
            else -> raw
        }
        if (text.isNotEmpty()) emit(JinjaToken.Kind.TEXT, text)
    }

    private fun skipComment() {
        val end = source.indexOf("#}", at)
        if (end < 0) fail("a comment does not end")
        val sign = source[end - 1]
        at = end + 2
        afterTag(sign.takeIf { end > at - 2 || it != '{' }, block = true)
    }

    private fun readTag(kind: JinjaToken.Kind, close: String) {
        emit(kind, "")
        var braces = 0 // of mappings: "}}" may be the end of two
        while (true) {
            while (at < source.length && Jinja.isSpace(source[at])) at++
            if (at >= source.length) fail("a tag does not end")
            val sign = source[at].takeIf { (it == '-' || it == '+') && source.startsWith(close, at + 1) }
            if (braces == 0 && (sign != null || source.startsWith(close, at))) {
                at += close.length + if (sign != null) 1 else 0
                emit(JinjaToken.Kind.CLOSE, "")
                return afterTag(sign, block = close == "%}")
            }
            if (source[at] == '{') braces++ else if (source[at] == '}' && braces > 0) braces--
            readWord()
        }
    }

    private fun afterTag(sign: Char?, block: Boolean) {
        val end = at
        if (sign == '-') {
            while (at < source.length && Jinja.isSpace(source[at])) at++
        } else if (block && sign != '+' && at < source.length && source[at] == '\n') {
            at++
        }
        lineStart = at > end && source[at - 1] == '\n'
    }

    private fun readWord() {
        val c = source[at]
        val match = WORD.find(source, at)?.takeIf { it.range.first == at }
        when {
            c == '"' || c == '\'' -> readString(c)
            match == null -> fail("'$c' is not understood")
            else -> {
                val word = match.value
                at += word.length
                val kind = when {
                    c.isDigit() -> if ('.' in word) JinjaToken.Kind.FLOAT else JinjaToken.Kind.INTEGER
                    c.isLetter() || c == '_' -> JinjaToken.Kind.NAME
                    else -> JinjaToken.Kind.SYMBOL
                }
                emit(kind, word)
            }
        }
    }

    private fun readString(quote: Char) {
        val text = StringBuilder()
        at++
        while (at < source.length && source[at] != quote) {
            val c = source[at++]
            text.append(if (c == '\\' && at < source.length) readEscape() else c.toString())
        }
        if (at >= source.length) fail("a text does not end")
        at++
        emit(JinjaToken.Kind.STRING, text.toString())
    }

    private fun readEscape(): String = when (val c = source[at++]) {
        'n' -> "\n"
        't' -> "\t"
        'r' -> "\r"
        'u', 'x' -> {
            val digits = source.substring(at, minOf(source.length, at + if (c == 'u') 4 else 2))
            at += digits.length
            (digits.toIntOrNull(16) ?: fail("a bad escape")).toChar().toString()
        }
        '\\', '\'', '"' -> c.toString()
        else -> "\\$c"
    }

    private fun emit(kind: JinjaToken.Kind, text: String) {
        tokens += JinjaToken(kind, text, line())
    }

    private fun line() = source.substring(0, minOf(at, source.length)).count { it == '\n' } + 1

    private fun fail(what: String): Nothing = throw Jinja.Fault("line ${line()}: $what")

    private companion object {
        val OPEN = Regex("\\{[{%#][-+]?")
        val WORD = Regex("[A-Za-z_][A-Za-z_0-9]*|[0-9]+(\\.[0-9]+)?|==|!=|<=|>=|//|[-+*/%~<>=|.,:()\\[\\]{}]")
    }
}
