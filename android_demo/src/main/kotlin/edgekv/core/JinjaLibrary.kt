package edgekv.core

import edgekv.core.Jinja.Arguments
import edgekv.core.Jinja.Callable
import edgekv.core.Jinja.Fault
import edgekv.core.Jinja.Undefined
import java.text.SimpleDateFormat
import java.util.Date
import java.util.Locale

/** The functions, filters, tests and methods of templates: Jinja's and Python's, as chat templates use them. */
internal object JinjaLibrary {
    val GLOBALS: Map<String, Any?> = mapOf(
        "namespace" to Callable { Jinja.Namespace(HashMap(it.named)) },
        "dict" to Callable { LinkedHashMap<Any?, Any?>(it.named) },
        "range" to Callable { Jinja.range(it.positional.map { n -> Jinja.number(n) }) },
        "raise_exception" to Callable { throw Fault(Jinja.text(it.positional.firstOrNull() ?: "")) },
        "strftime_now" to Callable { now(Jinja.string("strftime_now", it.positional.firstOrNull())) },
    )

    val FILTERS: Map<String, (Any?, Arguments) -> Any?> = mapOf(
        "trim" to { v, _ -> Jinja.text(v).trim(Jinja::isSpace) },
        "upper" to { v, _ -> Jinja.text(v).uppercase() },
        "lower" to { v, _ -> Jinja.text(v).lowercase() },
        "capitalize" to { v, _ -> capitalized(Jinja.text(v)) },
        "title" to { v, _ -> titled(Jinja.text(v)) },
        "replace" to { v, a -> replaced(Jinja.text(v), a) },
        "indent" to ::indented,
        "length" to { v, _ -> Jinja.items(v).size.toLong() },
        "count" to { v, _ -> Jinja.items(v).size.toLong() },
        "first" to { v, _ -> Jinja.items(v).getOrElse(0) { Undefined } },
        "last" to { v, _ -> Jinja.items(v).lastOrNull() ?: Undefined },
        "list" to { v, _ -> Jinja.items(v) },
        "reverse" to { v, _ -> if (v is String) Jinja.characters(v).reversed().joinToString("") else Jinja.items(v).reversed() },
        "unique" to { v, _ -> Jinja.items(v).distinct() },
        "sort" to { v, _ -> Jinja.items(v).sortedWith(Jinja::compare) },
        "string" to { v, _ -> Jinja.text(v) },
        "safe" to { v, _ -> v },
        "int" to { v, a -> whole(v) ?: a.positional.getOrElse(0) { 0L } },
        "float" to { v, _ -> Jinja.text(v).toDoubleOrNull() ?: 0.0 },
        "abs" to { v, _ -> if (v is Double) Math.abs(v) else Math.abs(Jinja.number(v)) },
        "join" to { v, a -> Jinja.items(v).joinToString(Jinja.text(a.positional.getOrElse(0) { "" })) { Jinja.text(it) } },
        "tojson" to ::json,
        "from_json" to { v, _ -> parsed(Jinja.text(v)) },
        "min" to { v, _ -> Jinja.items(v).minWithOrNull(Jinja::compare) ?: Undefined },
        "max" to { v, _ -> Jinja.items(v).maxWithOrNull(Jinja::compare) ?: Undefined },
        "items" to { v, _ -> pairs(v) },
        "dictsort" to { v, _ -> pairs(v).sortedBy { Jinja.text(it[0]).lowercase() } },
        "default" to ::default,
        "d" to ::default,
        "map" to ::mapped,
        "select" to { v, a -> Jinja.items(v).filter { tested(it, a.positional) } },
        "reject" to { v, a -> Jinja.items(v).filterNot { tested(it, a.positional) } },
        "selectattr" to { v, a -> Jinja.items(v).filter { tested(member(it, a), a.positional.drop(1)) } },
        "rejectattr" to { v, a -> Jinja.items(v).filterNot { tested(member(it, a), a.positional.drop(1)) } },
    )

    val TESTS: Map<String, (Any?, Arguments) -> Boolean> = mapOf(
        "defined" to { v, _ -> v !== Undefined },
        "undefined" to { v, _ -> v === Undefined },
        "none" to { v, _ -> v == null },
        "string" to { v, _ -> v is String },
        "boolean" to { v, _ -> v is Boolean },
        "number" to { v, _ -> v is Long || v is Double },
        "integer" to { v, _ -> v is Long },
        "float" to { v, _ -> v is Double },
        "mapping" to { v, _ -> v is Map<*, *> },
        "sequence" to { v, _ -> v is List<*> || v is String || v is Map<*, *> },
        "iterable" to { v, _ -> v is List<*> || v is String || v is Map<*, *> },
        "callable" to { v, _ -> v is Callable },
        "true" to { v, _ -> v == true },
        "false" to { v, _ -> v == false },
        "odd" to { v, _ -> Jinja.number(v) % 2 != 0L },
        "even" to { v, _ -> Jinja.number(v) % 2 == 0L },
        "equalto" to { v, a -> Jinja.equal(v, a.positional.getOrNull(0)) },
        "eq" to { v, a -> Jinja.equal(v, a.positional.getOrNull(0)) },
        "ne" to { v, a -> !Jinja.equal(v, a.positional.getOrNull(0)) },
        "in" to { v, a -> Jinja.contains(a.positional.getOrNull(0), v) },
    )

    val METHODS: Map<String, (Any?, Arguments) -> Any?> = mapOf(
        "get" to { v, a ->
            val map = v as? Map<*, *> ?: Jinja.fault("get", v)
            if (map.containsKey(a.positional[0])) map[a.positional[0]] else a.positional.getOrNull(1)
        },
        "items" to { v, _ -> pairs(v as? Map<*, *> ?: Jinja.fault("items", v)) },
        "keys" to { v, _ -> (v as? Map<*, *> ?: Jinja.fault("keys", v)).keys.toList() },
        "values" to { v, _ -> (v as? Map<*, *> ?: Jinja.fault("values", v)).values.toList() },
        "split" to { v, a -> split(Jinja.string("split", v), a) },
        "rsplit" to { v, a -> rsplit(Jinja.string("rsplit", v), a) },
        "splitlines" to { v, _ -> Jinja.string("splitlines", v).removeSuffix("\n").lines() },
        "join" to { v, a -> Jinja.items(a.positional.getOrNull(0)).joinToString(Jinja.string("join", v)) { Jinja.text(it) } },
        "find" to { v, a -> Jinja.string("find", v).indexOf(Jinja.string("find", a.positional.getOrNull(0))).toLong() },
        "rfind" to { v, a -> Jinja.string("rfind", v).lastIndexOf(Jinja.string("rfind", a.positional.getOrNull(0))).toLong() },
        "count" to { v, a -> Jinja.string("count", v).split(Jinja.string("count", a.positional.getOrNull(0))).size - 1L },
        "strip" to { v, a -> Jinja.string("strip", v).trim(Jinja.stripped(a)) },
        "lstrip" to { v, a -> Jinja.string("lstrip", v).trimStart(Jinja.stripped(a)) },
        "rstrip" to { v, a -> Jinja.string("rstrip", v).trimEnd(Jinja.stripped(a)) },
        "startswith" to { v, a -> affixes("startswith", a).any(Jinja.string("startswith", v)::startsWith) },
        "endswith" to { v, a -> affixes("endswith", a).any(Jinja.string("endswith", v)::endsWith) },
        "replace" to { v, a -> replaced(Jinja.string("replace", v), a) },
        "upper" to { v, _ -> Jinja.string("upper", v).uppercase() },
        "lower" to { v, _ -> Jinja.string("lower", v).lowercase() },
        "capitalize" to { v, _ -> capitalized(Jinja.string("capitalize", v)) },
        "title" to { v, _ -> titled(Jinja.string("title", v)) },
    )

    private fun affixes(name: String, a: Arguments): List<String> {
        val given = a.positional.getOrNull(0)
        return (given as? List<*> ?: listOf(given)).map { Jinja.string(name, it) }
    }

    private fun pairs(v: Any?): List<List<Any?>> = (v as? Map<*, *>).orEmpty().map { listOf(it.key, it.value) }

    private fun replaced(text: String, a: Arguments): String {
        val (old, new) = List(2) { Jinja.string("replace", a.positional.getOrNull(it)) }
        return text.replace(old, new)
    }

    private fun capitalized(text: String) = text.lowercase().replaceFirstChar { it.uppercase() }

    private fun titled(text: String) = Regex("\\p{L}+").replace(text) { capitalized(it.value) }

    private fun split(text: String, a: Arguments): List<String> {
        val by = a.positional.getOrNull(0) ?: return text.split(Regex("\\s+")).filter { it.isNotEmpty() }
        val most = a.positional.getOrNull(1)?.let { Jinja.number(it).toInt() } ?: -1
        return text.split(Jinja.string("split", by), limit = if (most < 0) 0 else most + 1)
    }

    private fun rsplit(text: String, a: Arguments): List<String> {
        val by = Jinja.string("rsplit", a.positional.getOrNull(0))
        val parts = text.split(by)
        val most = a.positional.getOrNull(1)?.let { Jinja.number(it).toInt() } ?: return parts
        val head = parts.dropLast(minOf(most, parts.size - 1))
        return listOf(head.joinToString(by)) + parts.drop(head.size)
    }

    private fun indented(v: Any?, a: Arguments): Any? {
        val width = a.positional.getOrNull(0) ?: a.named["width"] ?: 4L
        val by = if (width is String) width else " ".repeat(Jinja.number(width).coerceIn(0, MAX_INDENT).toInt())
        val first = Jinja.truth(a.positional.getOrNull(1) ?: a.named["first"] ?: false)
        val blank = Jinja.truth(a.positional.getOrNull(2) ?: a.named["blank"] ?: false)
        val lines = Jinja.text(v).split("\n")
        return lines.mapIndexed { i, line -> if (i == 0 && !first || i > 0 && line.isEmpty() && !blank) line else by + line }
            .joinToString("\n")
    }

    private fun json(v: Any?, a: Arguments): Any? {
        if (v === Undefined) throw Fault("a missing value has no JSON")
        val odd = (a.named.keys - setOf("ensure_ascii", "indent", "sort_keys")).firstOrNull()
        if (odd != null) throw Fault("tojson with $odd is not supported")
        val indent = (a.named["indent"] ?: a.positional.getOrNull(0))?.let { Jinja.number(it).coerceIn(0, MAX_INDENT).toInt() }
        return Json.write(
            v, sorted = Jinja.truth(a.named["sort_keys"] ?: false), ascii = Jinja.truth(a.named["ensure_ascii"] ?: false), indent,
        )
    }

    private fun parsed(text: String): Any? = try {
        Json.parse(text.toByteArray())
    } catch (e: JsonException) {
        throw Fault("a text is not JSON (${e.message})")
    }

    private fun default(v: Any?, a: Arguments): Any? {
        val missing = v === Undefined || Jinja.truth(a.positional.getOrNull(1) ?: a.named["boolean"] ?: false) && !Jinja.truth(v)
        return if (missing) a.positional.getOrElse(0) { "" } else v
    }

    private fun mapped(v: Any?, a: Arguments): Any? {
        val attribute = a.named["attribute"]
        if (attribute != null) return Jinja.items(v).map { Jinja.item(it, attribute) }
        val filter = FILTERS[Jinja.text(a.positional.getOrNull(0))] ?: throw Fault("the filter '${a.positional.firstOrNull()}' is not supported")
        return Jinja.items(v).map { filter(it, Arguments(a.positional.drop(1), emptyMap())) }
    }

    /** Whether a test, named in front of its arguments, holds; without one, whether `v` counts as true. */
    private fun tested(v: Any?, test: List<Any?>): Boolean {
        if (test.isEmpty()) return Jinja.truth(v)
        val name = Jinja.text(test[0])
        val holds = TESTS[if (name == "==") "eq" else name] ?: throw Fault("the test '$name' is not supported")
        return holds(v, Arguments(test.drop(1), emptyMap()))
    }

    private fun member(v: Any?, a: Arguments): Any? =
        Jinja.text(a.positional.getOrNull(0)).split('.').fold(v) { inner, name -> Jinja.attribute(inner, name) }

    private fun whole(v: Any?): Long? = when (v) {
        is Long -> v
        is Double -> v.toLong()
        is String -> v.trim().toLongOrNull()
        else -> null
    }

    /** The time now, in the codes of C's strftime that templates use. */
    private fun now(format: String): String {
        val out = StringBuilder()
        var at = 0
        while (at < format.length) {
            val code = Regex("%(-?[a-zA-Z])").find(format, at)?.takeIf { it.range.first == at }
            if (code == null) {
                out.append(format[at++])
                continue
            }
            val pattern = TIME[code.groupValues[1]] ?: throw Fault("the time format '${code.value}' is not supported")
            out.append(SimpleDateFormat(pattern, Locale.ENGLISH).format(Date()))
            at = code.range.last + 1
        }
        return out.toString()
    }

    private val TIME = mapOf(
        "d" to "dd", "-d" to "d", "b" to "MMM", "B" to "MMMM", "Y" to "yyyy", "y" to "yy", "m" to "MM", "-m" to "M",
        "H" to "HH", "I" to "hh", "M" to "mm", "S" to "ss", "p" to "a", "A" to "EEEE", "a" to "EEE", "j" to "DDD",
    )
    private const val MAX_INDENT = 100L
}
