package edgekv.core

import java.math.BigDecimal
import java.math.MathContext
import java.nio.ByteBuffer

/** JSON that cannot be read; the message names the byte. */
class JsonException(message: String) : Exception(message)

/**
 * Reads JSON value by value from memory or a mapped file, so that a tokenizer of 33 MB never
 * becomes a tree. Whoever is called for a key or an item reads exactly one value.
 */
class JsonReader(private val data: ByteBuffer) {
    /** Where the next value begins; may be set back to read it again. */
    var position = 0
    private var depth = 0

    /** The first character of the next value. */
    fun peek(): Char {
        while (position < data.limit() && data[position].toInt().toChar() in " \t\r\n") position++
        if (position >= data.limit()) fail("the text ends too early")
        return data[position].toInt().toChar()
    }

    fun readObject(onKey: (String) -> Unit) = nested('{', '}') {
        val key = readString()
        expect(':')
        onKey(key)
    }

    fun readArray(onItem: () -> Unit) = nested('[', ']', onItem)

    fun readString(): String {
        expect('"')
        val begin = position
        while (position < data.limit()) {
            when (data[position++].toInt()) {
                '"'.code -> return utf8(begin, position - 1)
                '\\'.code -> return readEscaped(begin)
                in 0..31 -> fail("a control character in a string")
            }
        }
        fail("a string does not end")
    }

    /** The next value: Map, List, String, Long, Double, Boolean or null. */
    fun readValue(): Any? = when (peek()) {
        '{' -> LinkedHashMap<String, Any?>().also { map -> readObject { map[it] = readValue() } }
        '[' -> ArrayList<Any?>().also { list -> readArray { list += readValue() } }
        '"' -> readString()
        else -> readScalar()
    }

    fun skip() {
        when (peek()) {
            '{' -> readObject { skip() }
            '[' -> readArray { skip() }
            '"' -> skipString()
            else -> readScalar()
        }
    }

    /** Nothing but white space may follow. */
    fun end() {
        while (position < data.limit()) {
            if (data[position].toInt().toChar() !in " \t\r\n") fail("something follows the value")
            position++
        }
    }

    private fun nested(open: Char, close: Char, item: () -> Unit) {
        expect(open)
        if (++depth > MAX_DEPTH) fail("nested deeper than $MAX_DEPTH")
        if (peek() == close) {
            position++
        } else {
            do {
                item()
                val next = peek()
                position++
                if (next != ',' && next != close) fail("expected ',' or '$close'")
            } while (next == ',')
        }
        depth--
    }

    private fun skipString() {
        expect('"')
        while (position < data.limit()) {
            when (data[position++].toInt()) {
                '"'.code -> return
                '\\'.code -> position++
            }
        }
        fail("a string does not end")
    }

    private fun readEscaped(begin: Int): String {
        val text = StringBuilder(utf8(begin, position - 1))
        position--
        var plain = position
        while (position < data.limit()) {
            when (data[position++].toInt()) {
                '"'.code -> return text.append(utf8(plain, position - 1)).toString()
                '\\'.code -> {
                    text.append(utf8(plain, position - 1)).append(readEscape())
                    plain = position
                }
                in 0..31 -> fail("a control character in a string")
            }
        }
        fail("a string does not end")
    }

    private fun readEscape(): Char {
        if (position >= data.limit()) fail("a string does not end")
        return when (val c = data[position++].toInt().toChar()) {
            '"', '\\', '/' -> c
            'b' -> '\b'
            'f' -> '\u000c'
            'n' -> '\n'
            'r' -> '\r'
            't' -> '\t'
            'u' -> {
                if (position + 4 > data.limit()) fail("a string does not end")
                position += 4
                utf8(position - 4, position).toIntOrNull(16)?.toChar() ?: fail("a bad \\u escape")
            }
            else -> fail("an unknown escape \\$c")
        }
    }

    private fun readScalar(): Any? {
        val begin = position
        while (position < data.limit() && data[position].toInt().toChar() !in ",]} \t\r\n") position++
        val word = utf8(begin, position)
        return when {
            word == "null" -> null
            word == "true" -> true
            word == "false" -> false
            NUMBER.matches(word) -> word.toLongOrNull() ?: word.toDouble()
            else -> {
                position = begin
                fail("'${word.take(20)}' is not a value")
            }
        }
    }

    private fun expect(c: Char) {
        if (peek() != c) fail("expected '$c'")
        position++
    }

    private fun utf8(begin: Int, end: Int): String {
        val bytes = ByteArray(end - begin)
        val view = data.duplicate()
        view.position(begin)
        view.get(bytes)
        return String(bytes, Charsets.UTF_8)
    }

    private fun fail(reason: String): Nothing = throw JsonException("$reason at byte $position")

    private companion object {
        const val MAX_DEPTH = 100
        val NUMBER = Regex("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")
    }
}

/** JSON text of trees of Map, List, String, numbers, Boolean and null, and back. */
object Json {
    /** @throws JsonException with the byte where reading stopped */
    fun parse(bytes: ByteArray): Any? {
        val reader = JsonReader(ByteBuffer.wrap(bytes))
        return reader.readValue().also { reader.end() }
    }

    /** As `json.dumps(value, sort_keys=sorted, ensure_ascii=ascii, indent=indent)` writes it in Python. */
    fun write(value: Any?, sorted: Boolean = true, ascii: Boolean = true, indent: Int? = null): String =
        StringBuilder().also { JsonWriter(it, sorted, ascii, indent).write(value, 1) }.toString()

    /** The shortest digits that read back as `value`, laid out as Python's `repr` does. */
    fun pythonFloat(value: Double): String {
        if (value.isNaN()) return "NaN"
        if (value.isInfinite()) return if (value > 0) "Infinity" else "-Infinity"
        if (value == 0.0) return if (1 / value < 0) "-0.0" else "0.0"
        val exact = BigDecimal(value)
        val shortest = (1..17).map { exact.round(MathContext(it)) }.first { it.toDouble() == value }
        val digits = shortest.unscaledValue().abs().toString().trimEnd('0')
        val exponent = shortest.precision() - shortest.scale() - 1
        val sign = if (value < 0) "-" else ""
        if (exponent < -4 || exponent >= 16) {
            val mantissa = digits.take(1) + if (digits.length > 1) "." + digits.drop(1) else ""
            val power = Math.abs(exponent).toString().padStart(2, '0')
            return "$sign${mantissa}e${if (exponent < 0) '-' else '+'}$power"
        }
        if (exponent < 0) return sign + "0." + "0".repeat(-exponent - 1) + digits
        val whole = digits.padEnd(exponent + 1, '0')
        return sign + whole.take(exponent + 1) + "." + whole.drop(exponent + 1).ifEmpty { "0" }
    }
}

private class JsonWriter(
    private val out: StringBuilder,
    private val sorted: Boolean,
    private val ascii: Boolean,
    private val indent: Int?,
) {
    fun write(value: Any?, depth: Int) {
        when (value) {
            is Map<*, *> -> {
                val keys = value.keys.map { it as String }.let { if (sorted) it.sorted() else it }
                items('{', '}', keys, depth) { key ->
                    quote(key)
                    out.append(": ")
                    write(value[key], depth + 1)
                }
            }
            is List<*> -> items('[', ']', value, depth) { write(it, depth + 1) }
            is String -> quote(value)
            is Double -> out.append(Json.pythonFloat(value))
            else -> out.append(value)
        }
    }

    private fun <T> items(open: Char, close: Char, items: Collection<T>, depth: Int, item: (T) -> Unit) {
        out.append(open)
        items.forEachIndexed { i, it ->
            if (i > 0) out.append(if (indent == null) ", " else ",")
            newLine(depth)
            item(it)
        }
        if (items.isNotEmpty()) newLine(depth - 1)
        out.append(close)
    }

    private fun newLine(depth: Int) {
        if (indent != null) out.append('\n').append(" ".repeat(indent * depth))
    }

    private fun quote(text: String) {
        out.append('"')
        for (c in text) {
            when {
                c == '"' -> out.append("\\\"")
                c == '\\' -> out.append("\\\\")
                c == '\n' -> out.append("\\n")
                c == '\r' -> out.append("\\r")
                c == '\t' -> out.append("\\t")
                c == '\b' -> out.append("\\b")
                c == '\u000c' -> out.append("\\f")
                c < ' ' || ascii && c > '~' -> out.append("\\u").append(c.code.toString(16).padStart(4, '0'))
                else -> out.append(c)
            }
        }
        out.append('"')
    }
}
