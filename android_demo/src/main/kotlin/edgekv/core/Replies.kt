package edgekv.core

/**
 * How a family of models marks its replies; a row of `replies.json`, which the Python runtime reads too
 * and describes (`edge_kv.runtime.replies.ReplyGrammar`).
 */
class ReplyGrammar(
    val needs: List<String>,
    val think: Pair<String, String>,
    val labelled: Boolean,
    val call: Pair<String, String>?,
    val syntax: String,
    val quote: String,
)

/** The kinds of replies, as the shared table has them. */
internal object ReplyTable {
    val grammars: List<ReplyGrammar>
    val turnEnds: List<String>

    init {
        val file = ReplyTable::class.java.getResourceAsStream("/replies.json")
            ?: throw IllegalStateException("this build lacks replies.json")
        val table = Fields(Json.parse(file.use { it.readBytes() }) as Map<*, *>, "replies.json")
        grammars = table.listOfFields("grammars").map {
            ReplyGrammar(
                needs = it.texts("needs"), think = pair(it.texts("think")), labelled = it.flagOr("labelled", false),
                call = if (it.has("call")) pair(it.texts("call")) else null, syntax = it.text("syntax"),
                quote = it.textOrNull("quote").orEmpty(),
            )
        }
        turnEnds = table.texts("turn_ends")
    }

    private fun pair(texts: List<String>) = Pair(texts[0], texts[1])
}

/** A part of a reply: more of the answer or of the thinking, or one whole tool call. */
class Piece(val kind: Kind, val text: String, val call: ToolCall? = null) {
    enum class Kind { CONTENT, THINKING, CALL }
}

/** The grammar of a model with this tokenizer and chat template, its marks looked up. */
class ReplyFormat(val tokenizer: Tokenizer, template: String) {
    val grammar: ReplyGrammar = ReplyTable.grammars.first { row ->
        row.needs.all { it in template || tokenizer.id(it) != null }
    }

    /** Ids that are marks. */
    val marks: Map<Int, String>

    /** Marks that are no token and are looked for in text. */
    val texts: List<String>
    val quote = grammar.quote.takeIf { it.isNotEmpty() }?.let(tokenizer::id)

    /** Ids that end a turn where the template writes them, whatever the checkpoint's eos says. */
    val ends: Set<Int> = ReplyTable.turnEnds.filter { it in template }.mapNotNull(tokenizer::id).toSet()

    init {
        val all = listOf(grammar.think, grammar.call ?: Pair("", "")).flatMap { it.toList() }.filter { it.isNotEmpty() }
        marks = all.mapNotNull { mark -> tokenizer.id(mark)?.let { it to mark } }.toMap()
        texts = all.filter { it !in marks.values && it in template }
    }

    /** Whether `prompt` leaves a thought open. */
    fun opened(prompt: IntArray): Boolean {
        val last = prompt.lastOrNull { marks[it] == grammar.think.first || marks[it] == grammar.think.second }
        return last != null && marks[last] == grammar.think.first
    }
}

/** Text in, text out, holding back what may be the start of a text looked for. */
internal class Holdback(private val wanted: List<String>) {
    private var held = ""

    /** Text up to the first text looked for, and that text, "" when none came; "" goes on behind it. */
    fun feed(text: String): Pair<String, String> {
        held += text
        val found = wanted.filter { it in held }.minWithOrNull(compareBy<String>({ held.indexOf(it) }, { -it.length }, { it }))
        if (found != null) {
            val before = held.substringBefore(found)
            held = held.substring(before.length + found.length)
            return Pair(before, found)
        }
        val keep = wanted.maxOfOrNull { overlap(held, it) } ?: 0
        val given = held.dropLast(keep)
        held = held.takeLast(keep)
        return Pair(given, "")
    }

    /** What is held when the text ends. */
    fun flush(): String = held.also { held = "" }

    /** How many characters at the end of `text` begin `wanted`. */
    private fun overlap(text: String, wanted: String): Int =
        (minOf(text.length, wanted.length - 1) downTo 1).firstOrNull { wanted.startsWith(text.takeLast(it)) } ?: 0
}

/** Ids of one reply in, pieces out; `thinking`: the prompt has opened a thought. */
class ReplyParser(private val format: ReplyFormat, thinking: Boolean) {
    private val stream = TextStream(format.tokenizer)
    private val marks = Holdback(format.texts)
    private var state = if (thinking) Piece.Kind.THINKING else Piece.Kind.CONTENT
    private var label = false // the first line of a thought, its channel's name, is still to come
    private var fresh = thinking // leading line ends of a block are no part of it
    private var tail = "" // white space that may be the end of a thought
    private var body = "" // of the call under way
    private var calls = 0

    /** What `id` adds: usually one piece, or none yet. */
    fun feed(id: Int): List<Piece> {
        val mark = format.marks[id]
        return when {
            mark != null -> text(stream.flush()) + marked(mark)
            state == Piece.Kind.CALL && id == format.quote -> text(stream.flush() + CallReader.QUOTE)
            state == Piece.Kind.CALL && format.tokenizer.isSpecial(id) -> text(stream.flush() + format.tokenizer.token(id))
            else -> text(stream.feed(id))
        }
    }

    /** What was held back when the ids end; a call that broke off is part of the answer. */
    fun end(): List<Piece> {
        val pieces = text(stream.flush()) + plain(marks.flush())
        if (state != Piece.Kind.CALL) return pieces
        state = Piece.Kind.CONTENT
        return pieces + Piece(state, format.grammar.call?.first.orEmpty() + body.replace(CallReader.QUOTE, ""))
    }

    /** Text with marks that are no tokens. */
    private fun text(text: String): List<Piece> {
        if (format.texts.isEmpty()) return plain(text)
        val pieces = ArrayList<Piece>()
        var (before, hit) = marks.feed(text)
        while (hit.isNotEmpty()) {
            pieces += plain(before) + marked(hit)
            val next = marks.feed("")
            before = next.first
            hit = next.second
        }
        return pieces + plain(before)
    }

    private fun plain(given: String): List<Piece> {
        var text = given
        if (state == Piece.Kind.CALL) {
            body += text
            return emptyList()
        }
        if (label) {
            body += text
            if ('\n' !in body) return emptyList()
            text = body.substringAfter('\n')
            label = false
            body = ""
        }
        if (fresh) text = text.trimStart('\r', '\n')
        if (text.isEmpty()) return emptyList()
        fresh = false
        if (state == Piece.Kind.CONTENT) return listOf(Piece(state, text))
        text = tail + text
        val kept = text.trimEnd(Jinja::isSpace)
        tail = text.substring(kept.length)
        return if (kept.isEmpty()) emptyList() else listOf(Piece(state, kept))
    }

    private fun marked(mark: String): List<Piece> {
        val (begin, end) = format.grammar.think
        val call = format.grammar.call
        if (state == Piece.Kind.CALL) {
            if (mark != call?.second) {
                body += mark
                return emptyList()
            }
            val whole = body
            start(Piece.Kind.CONTENT)
            return called(whole)
        }
        when (mark) {
            begin -> {
                start(Piece.Kind.THINKING)
                label = format.grammar.labelled
            }
            call?.first -> start(Piece.Kind.CALL)
            end -> start(Piece.Kind.CONTENT)
        }
        return emptyList()
    }

    private fun start(kind: Piece.Kind) {
        state = kind
        fresh = true
        label = false
        tail = ""
        body = ""
    }

    /** The calls a body describes; the body as text where it describes none. */
    private fun called(body: String): List<Piece> {
        val found = CallReader.read(format.grammar.syntax, body)
        if (found == null) {
            val (open, close) = format.grammar.call ?: Pair("", "")
            return listOf(Piece(Piece.Kind.CONTENT, open + body.replace(CallReader.QUOTE, "") + close))
        }
        return found.map { (name, arguments) ->
            val text = Json.write(arguments, sorted = false, ascii = false)
            Piece(Piece.Kind.CALL, text, ToolCall(name, arguments, "call_${++calls}"))
        }
    }
}

/** Reads tool calls in the syntaxes that models write them in, as `edge_kv.runtime.replies` does. */
internal object CallReader {
    /** Stands for the quote mark in a call; no text holds this code point. */
    const val QUOTE = "\uDBFF\uDFFF"
    private class Odd : Exception()

    /** Names and arguments; null where `body` is no call. */
    fun read(syntax: String, body: String): List<Pair<String, Map<*, *>>>? = try {
        when (syntax) {
            "braces" -> braces(body)
            "pairs" -> pairs(body)
            "parameters" -> parameters(body)
            else -> json(body)
        }
    } catch (e: Odd) {
        null
    } catch (e: JsonException) {
        null
    }

    private fun parse(text: String): Any? = Json.parse(text.toByteArray())

    private fun json(body: String): List<Pair<String, Map<*, *>>> {
        val data = parse(body)
        return (data as? List<*> ?: listOf(data)).map { item ->
            val call = item as? Map<*, *> ?: throw Odd()
            val raw = if (call.containsKey("arguments")) call["arguments"] else call.getOrElseAny("parameters")
            val arguments = if (raw is String) parse(raw) else raw
            Pair(call["name"] as? String ?: throw Odd(), arguments as? Map<*, *> ?: throw Odd())
        }
    }

    private fun Map<*, *>.getOrElseAny(name: String): Any? = if (containsKey(name)) get(name) else emptyMap<String, Any?>()

    /** `call:name{key:value,…}` with texts between quote marks and bare keys. */
    private fun braces(body: String): List<Pair<String, Map<*, *>>> {
        val name = body.substringBefore('{').trim().removePrefix("call:").trim()
        if (name.isEmpty() || '{' !in body) throw Odd()
        val reader = Braces(body.substring(body.indexOf('{')))
        val arguments = reader.value() as? Map<*, *>
        if (arguments == null || reader.rest().isNotBlank()) throw Odd()
        return listOf(Pair(name, arguments))
    }

    /** `name` and then `<arg_key>key</arg_key><arg_value>value</arg_value>` for each argument. */
    private fun pairs(body: String): List<Pair<String, Map<*, *>>> {
        val name = body.substringBefore("<arg_key>").trim()
        if (name.isEmpty()) throw Odd()
        val found = Regex("<arg_key>(.*?)</arg_key>\\s*<arg_value>(.*?)</arg_value>", RegexOption.DOT_MATCHES_ALL).findAll(body)
        return listOf(Pair(name, found.associate { it.groupValues[1].trim() to bare(it.groupValues[2]) }))
    }

    /** `<function=name>` and then `<parameter=key>value</parameter>` for each argument. */
    private fun parameters(body: String): List<Pair<String, Map<*, *>>> {
        val call = Regex("<function=([^>\n]+)>(.*?)(?:</function>|$)", RegexOption.DOT_MATCHES_ALL)
        val argument = Regex("<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", RegexOption.DOT_MATCHES_ALL)
        val calls = call.findAll(body).map { found ->
            val (name, inner) = found.destructured
            Pair(name.trim(), argument.findAll(inner).associate { it.groupValues[1].trim() to bare(it.groupValues[2]) })
        }.toList()
        return calls.ifEmpty { throw Odd() }
    }

    /** A value written bare: JSON, or text where it is none. */
    private fun bare(text: String): Any? = when (text) {
        "True" -> true
        "False" -> false
        "None" -> null
        else -> try {
            parse(text)
        } catch (e: JsonException) {
            text
        }
    }

    /** Values in braces: texts between quote marks, JSON otherwise, keys bare or quoted. */
    private class Braces(private val text: String) {
        private var at = 0
        private var depth = 0

        fun rest() = text.substring(at)

        fun value(): Any? = when {
            peek("{") -> items("}") { pair() }.associate { it }
            peek("[") -> items("]") { value() }
            peek(QUOTE) -> quoted()
            else -> {
                val end = (at until text.length).firstOrNull { text[it] in ",}]" } ?: text.length
                val word = text.substring(at, end).trim()
                at = end
                if (word in setOf("None", "null", "")) null else parse(word)
            }
        }

        private fun pair(): Pair<String, Any?> {
            val key = if (peek(QUOTE)) quoted() else {
                val colon = text.indexOf(':', at)
                if (colon < 0) throw Odd()
                text.substring(at, colon).trim().trim('"').also { at = colon }
            }
            if (!peek(":")) throw Odd()
            at++
            return Pair(key, value())
        }

        private fun <T> items(close: String, item: () -> T): List<T> {
            if (++depth > MAX_DEPTH) throw Odd()
            at++
            val items = ArrayList<T>()
            while (!peek(close)) {
                items += item()
                if (peek(",")) at++ else if (!peek(close)) throw Odd()
            }
            at++
            depth--
            return items
        }

        private fun quoted(): String {
            val end = text.indexOf(QUOTE, at + QUOTE.length)
            if (end < 0) throw Odd()
            return text.substring(at + QUOTE.length, end).also { at = end + QUOTE.length }
        }

        /** Whether `wanted` comes next, behind white space. */
        private fun peek(wanted: String): Boolean {
            while (at < text.length && text[at].isWhitespace()) at++
            return text.startsWith(wanted, at)
        }

        private companion object {
            const val MAX_DEPTH = 100
        }
    }
}
