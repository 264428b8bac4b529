package edgekv.core

/**
 * Values and operations of the templates: Python's, as far as chat templates use them. A value is
 * String, Long, Double, Boolean, List, Map, null (None), a namespace, something to call, or undefined.
 */
internal object Jinja {
    class Fault(message: String) : Exception(message)

    object Undefined

    class Namespace(val values: MutableMap<String, Any?>)

    class Arguments(val positional: List<Any?>, val named: Map<String, Any?>)

    fun interface Callable {
        fun call(arguments: Arguments): Any?
    }

    fun interface Expression {
        fun value(scope: Scope): Any?
    }

    fun interface Statement {
        fun run(scope: Scope, out: StringBuilder)
    }

    class Block(private val statements: List<Statement>) : Statement {
        override fun run(scope: Scope, out: StringBuilder) = statements.forEach { it.run(scope, out) }
    }

    /** Names of one iteration or macro call; what is not here is looked up outside. */
    class Scope(variables: Map<String, Any?>, private val outer: Scope? = null) {
        private val names = HashMap(variables)
        val root: Scope get() = outer?.root ?: this

        operator fun get(name: String): Any? = when {
            names.containsKey(name) -> names[name]
            outer != null -> outer[name]
            else -> GLOBALS.getOrElse(name) { Undefined }
        }

        operator fun set(name: String, value: Any?) {
            names[name] = value
        }
    }

    private val GLOBALS: Map<String, Any?> = mapOf(
        "namespace" to Callable { Namespace(HashMap(it.named)) },
        "range" to Callable { range(it.positional.map { n -> number(n) }) },
        "raise_exception" to Callable { throw Fault(text(it.positional.firstOrNull() ?: "")) },
    )

    val FILTERS: Map<String, (Any?, Arguments) -> Any?> = mapOf(
        "trim" to { v, _ -> text(v).trim(::isSpace) },
        "upper" to { v, _ -> text(v).uppercase() },
        "lower" to { v, _ -> text(v).lowercase() },
        "length" to { v, _ -> items(v).size.toLong() },
        "first" to { v, _ -> items(v).getOrElse(0) { Undefined } },
        "last" to { v, _ -> items(v).lastOrNull() ?: Undefined },
        "list" to { v, _ -> items(v) },
        "string" to { v, _ -> text(v) },
        "join" to { v, a -> items(v).joinToString(text(a.positional.getOrElse(0) { "" })) { text(it) } },
        "tojson" to { v, _ -> Json.spaced(v) },
        "items" to { v, _ -> (v as? Map<*, *>).orEmpty().map { listOf(it.key, it.value) } },
        "dictsort" to { v, _ ->
            (v as? Map<*, *>).orEmpty().map { listOf(it.key, it.value) }.sortedBy { text(it[0]).lowercase() }
        },
        "default" to { v, a ->
            val missing = v === Undefined || a.positional.getOrNull(1) == true && !truth(v)
            if (missing) a.positional.getOrElse(0) { "" } else v
        },
        "map" to { v, a ->
            val filter = FILTERS[text(a.positional[0])] ?: throw Fault("the filter '${a.positional[0]}' is not supported")
            items(v).map { filter(it, Arguments(a.positional.drop(1), emptyMap())) }
        },
    )

    val TESTS: Map<String, (Any?) -> Boolean> = mapOf(
        "defined" to { it !== Undefined },
        "undefined" to { it === Undefined },
        "none" to { it == null },
        "string" to { it is String },
        "boolean" to { it is Boolean },
        "number" to { it is Long || it is Double },
        "integer" to { it is Long },
        "mapping" to { it is Map<*, *> },
        "sequence" to { it is List<*> || it is String || it is Map<*, *> },
        "iterable" to { it is List<*> || it is String || it is Map<*, *> },
        "true" to { it == true },
        "false" to { it == false },
    )

    private val METHODS: Map<String, (Any?, Arguments) -> Any?> = mapOf(
        "get" to { v, a ->
            val map = v as? Map<*, *> ?: fault("get", v)
            if (map.containsKey(a.positional[0])) map[a.positional[0]] else a.positional.getOrNull(1)
        },
        "items" to { v, a -> FILTERS.getValue("items")(v, a) },
        "keys" to { v, _ -> (v as? Map<*, *> ?: fault("keys", v)).keys.toList() },
        "values" to { v, _ -> (v as? Map<*, *> ?: fault("values", v)).values.toList() },
        "split" to { v, a -> string("split", v).split(string("split", a.positional.getOrNull(0))) },
        "strip" to { v, a -> string("strip", v).trim(stripped(a)) },
        "lstrip" to { v, a -> string("lstrip", v).trimStart(stripped(a)) },
        "rstrip" to { v, a -> string("rstrip", v).trimEnd(stripped(a)) },
        "startswith" to { v, a -> string("startswith", v).startsWith(string("startswith", a.positional.getOrNull(0))) },
        "endswith" to { v, a -> string("endswith", v).endsWith(string("endswith", a.positional.getOrNull(0))) },
        "replace" to { v, a ->
            val (old, new) = List(2) { string("replace", a.positional.getOrNull(it)) }
            string("replace", v).replace(old, new)
        },
        "upper" to { v, _ -> string("upper", v).uppercase() },
        "lower" to { v, _ -> string("lower", v).lowercase() },
    )

    fun truth(v: Any?): Boolean = when (v) {
        null, Undefined, false, 0L, 0.0, "" -> false
        is List<*> -> v.isNotEmpty()
        is Map<*, *> -> v.isNotEmpty()
        else -> true
    }

    /** What `{{ v }}` prints. */
    fun text(v: Any?): String = when (v) {
        is String -> v
        Undefined -> ""
        null -> "None"
        true -> "True"
        false -> "False"
        is Long -> v.toString()
        is Double -> Json.pythonFloat(v)
        else -> throw Fault("a ${kind(v)} cannot be printed")
    }

    fun items(v: Any?): List<Any?> = when (v) {
        is List<*> -> v
        is Map<*, *> -> v.keys.toList()
        is String -> characters(v)
        Undefined -> emptyList()
        else -> throw Fault("a ${kind(v)} has no items")
    }

    fun attribute(v: Any?, name: String): Any? = when (v) {
        is Map<*, *> -> if (v.containsKey(name)) v[name] else method(v, name) ?: Undefined
        is Namespace -> v.values.getOrElse(name) { Undefined }
        Undefined -> throw Fault("'$name' is asked of something undefined")
        else -> method(v, name) ?: Undefined
    }

    fun item(v: Any?, key: Any?): Any? = when {
        v === Undefined -> throw Fault("${if (key is String) "'$key'" else "an item"} is asked of something undefined")
        key is Long && (v is List<*> || v is String) ->
            items(v).let { it.getOrElse(if (key < 0) it.size + key.toInt() else key.toInt()) { Undefined } }
        v is Map<*, *> && v.containsKey(key) -> v[key]
        key is String -> attribute(v, key)
        else -> Undefined
    }

    fun slice(v: Any?, from: Any?, until: Any?): Any? {
        val all = items(v)
        fun bound(n: Any?, default: Int): Int {
            val at = if (n == null) default else number(n).toInt()
            return (if (at < 0) at + all.size else at).coerceIn(0, all.size)
        }
        val (a, b) = Pair(bound(from, 0), bound(until, all.size))
        val part = if (a < b) all.subList(a, b) else emptyList()
        return if (v is String) part.joinToString("") else part
    }

    fun call(v: Any?, arguments: Arguments): Any? =
        (v as? Callable ?: throw Fault("a ${kind(v)} is called")).call(arguments)

    fun contains(container: Any?, v: Any?): Boolean =
        if (container is String) string("in", v) in container else items(container).any { equal(it, v) }

    fun equal(a: Any?, b: Any?): Boolean = if (a is Number && b is Number) a.toDouble() == b.toDouble() else a == b

    fun compare(a: Any?, b: Any?): Int = when {
        a is Number && b is Number -> a.toDouble().compareTo(b.toDouble())
        a is String && b is String -> a.compareTo(b)
        else -> throw Fault("a ${kind(a)} is compared with a ${kind(b)}")
    }

    fun plus(a: Any?, b: Any?): Any? = when {
        a is String && b is String -> a + b
        a is List<*> && b is List<*> -> a + b
        else -> arithmetic(a, b, Long::plus, Double::plus)
    }

    fun arithmetic(a: Any?, b: Any?, whole: (Long, Long) -> Long, real: (Double, Double) -> Double): Any = when {
        a is Long && b is Long -> whole(a, b)
        a is Number && b is Number -> real(a.toDouble(), b.toDouble())
        else -> throw Fault("a ${kind(a)} and a ${kind(b)} do not compute")
    }

    /** What Python's `str.strip` takes off. */
    fun isSpace(c: Char): Boolean = c in '\t'..'\r' || c in '\u001c'..'\u001f' || c == '\u0085' || Character.isSpaceChar(c)

    private fun characters(text: String): List<String> {
        val starts = text.indices.filter { it == 0 || !(text[it].isLowSurrogate() && text[it - 1].isHighSurrogate()) }
        return starts.mapIndexed { i, start -> text.substring(start, starts.getOrElse(i + 1) { text.length }) }
    }

    private fun method(v: Any?, name: String): Callable? = METHODS[name]?.let { f -> Callable { f(v, it) } }

    private fun stripped(a: Arguments): (Char) -> Boolean {
        val characters = a.positional.getOrNull(0) ?: return ::isSpace
        return { it in text(characters) }
    }

    private fun range(n: List<Long>): List<Long> {
        val (from, until, step) = Triple(if (n.size > 1) n[0] else 0L, if (n.size > 1) n[1] else n[0], n.getOrElse(2) { 1L })
        if (step == 0L) throw Fault("a range with step 0")
        return if (step > 0) (from until until step step).toList() else (from downTo until + 1 step -step).toList()
    }

    private fun number(v: Any?): Long = v as? Long ?: throw Fault("a ${kind(v)} is not a whole number")

    private fun string(what: String, v: Any?): String = v as? String ?: fault(what, v)

    private fun fault(what: String, v: Any?): Nothing = throw Fault("a ${kind(v)} has no '$what'")

    private fun kind(v: Any?) = when (v) {
        null -> "None"
        Undefined -> "missing value"
        is String -> "text"
        is Boolean -> "truth value"
        is Number -> "number"
        is List<*> -> "list"
        is Map<*, *> -> "mapping"
        else -> "function"
    }
}
