package edgekv.onnx

import java.io.ByteArrayOutputStream
import java.io.IOException

/** Where one tensor lies: the `external_data` of a TensorProto (location, offset, length, prepacked_*). */
internal typealias Entries = Map<String, String>

/**
 * Where an ONNX file keeps its weights, read and replaced without an ONNX library: only those
 * entries are taken apart, every other byte is copied as it is. Field numbers are onnx.proto's.
 */
internal object OnnxFile {
    private const val GRAPH = 7
    private const val INITIALIZER = 5
    private const val NAME = 8
    private const val EXTERNAL = 13
    private const val KEY = 1
    private const val VALUE = 2

    /** Name -> entries of every initializer of the main graph that lies in another file. */
    fun externalData(model: ByteArray): Map<String, Entries> {
        val found = LinkedHashMap<String, Entries>()
        for (graph in fields(Span(model)).filter { it.number == GRAPH }) {
            for (tensor in fields(graph.content).filter { it.number == INITIALIZER }) {
                val (name, entries) = tensor(tensor.content)
                if (entries.isNotEmpty()) found[name] = entries
            }
        }
        return found
    }

    /**
     * The model with the entries of every initializer that has some taken from `known`.
     *
     * @throws IOException an initializer lies in another file and `known` does not have it
     */
    fun replaceExternalData(model: ByteArray, known: Map<String, Entries>): ByteArray {
        val out = ByteArrayOutputStream(model.size + model.size / 8)
        for (field in fields(Span(model))) {
            if (field.number == GRAPH) record(out, GRAPH, graph(field.content, known)) else out.write(field.whole)
        }
        return out.toByteArray()
    }

    private fun graph(raw: Span, known: Map<String, Entries>): ByteArray {
        val out = ByteArrayOutputStream(raw.size)
        for (field in fields(raw)) {
            val (name, old) = if (field.number == INITIALIZER) tensor(field.content) else Pair("", emptyMap())
            if (old.isEmpty()) {
                out.write(field.whole)
                continue
            }
            val entries = known[name] ?: throw IOException("$name is not among the packed weights")
            record(out, INITIALIZER, moved(field.content, entries))
        }
        return out.toByteArray()
    }

    private fun moved(raw: Span, entries: Entries): ByteArray {
        val out = ByteArrayOutputStream()
        for (field in fields(raw)) if (field.number != EXTERNAL) out.write(field.whole)
        for ((key, value) in entries) {
            val pair = ByteArrayOutputStream()
            record(pair, KEY, key.toByteArray())
            record(pair, VALUE, value.toByteArray())
            record(out, EXTERNAL, pair.toByteArray())
        }
        return out.toByteArray()
    }

    private fun tensor(raw: Span): Pair<String, Entries> {
        var name = ""
        val entries = LinkedHashMap<String, String>()
        for (field in fields(raw)) {
            if (field.number == NAME) name = field.content.text()
            if (field.number == EXTERNAL) {
                val pair = fields(field.content).associate { it.number to it.content.text() }
                entries[pair[KEY].orEmpty()] = pair[VALUE].orEmpty()
            }
        }
        return Pair(name, entries)
    }

    /** Bytes `from` until `until` of `data`. */
    private class Span(val data: ByteArray, val from: Int = 0, val until: Int = data.size) {
        val size get() = until - from

        fun text() = String(data, from, size, Charsets.UTF_8)
    }

    /** One field of a message: its content, and all of it with its tag. */
    private class Field(val number: Int, val content: Span, val whole: Span)

    private fun ByteArrayOutputStream.write(span: Span) = write(span.data, span.from, span.size)

    private fun fields(message: Span): Sequence<Field> = sequence {
        var at = message.from
        fun varint(): Long {
            var value = 0L
            for (shift in 0..63 step 7) {
                if (at >= message.until) throw IOException("a number is cut off at byte $at of an ONNX file")
                val byte = message.data[at++].toLong()
                value = value or (byte and 127 shl shift)
                if (byte >= 0) return value
            }
            throw IOException("a number is too long at byte $at of an ONNX file")
        }
        while (at < message.until) {
            val start = at
            val tag = varint()
            val length = when ((tag and 7).toInt()) {
                0 -> 0L.also { varint() }
                1 -> 8L
                2 -> varint()
                5 -> 4L
                else -> throw IOException("wire type ${tag and 7} at byte $start of an ONNX file")
            }
            if (length !in 0..message.until - at) throw IOException("a field at byte $start of an ONNX file is cut off")
            val content = Span(message.data, at, at + length.toInt())
            at = content.until
            yield(Field((tag ushr 3).toInt(), content, Span(message.data, start, at)))
        }
    }

    private fun record(out: ByteArrayOutputStream, number: Int, content: ByteArray) {
        number(out, (number shl 3 or 2).toLong())
        number(out, content.size.toLong())
        out.write(content)
    }

    private fun number(out: ByteArrayOutputStream, value: Long) {
        var left = value
        while (left > 127) {
            out.write((left and 127 or 128).toInt())
            left = left ushr 7
        }
        out.write(left.toInt())
    }
}
