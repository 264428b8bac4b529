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
            else -> JinjaLibrary.GLOBALS.getOrElse(name) { Undefined }
        }

        operator fun set(name: String, value: Any?) {
            names[name] = value
        }
    }

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

    fun slice(v: Any?, from: Any?, until: Any?, by: Any?): Any? {
        val all = items(v)
        val step = if (by == null) 1 else number(by).toInt()
        if (step == 0) throw Fault("a slice with step 0")
        fun bound(n: Any?, default: Int): Int {
            if (n == null) return default
            val at = number(n).let { if (it < 0) it + all.size else it }
            return (if (step > 0) at.coerceIn(0, all.size.toLong()) else at.coerceIn(-1, all.size - 1L)).toInt()
        }
        val part = if (step > 0) {
            (bound(from, 0) until bound(until, all.size) step step).map { all[it] }
        } else {
            (bound(from, all.lastIndex) downTo bound(until, -1) + 1 step -step).map { all[it] }
        }
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

    fun times(a: Any?, b: Any?): Any? = when {
        a is String && b is Long -> repeated(a, b)
        a is Long && b is String -> repeated(b, a)
        else -> arithmetic(a, b, Long::times, Double::times)
    }

    private fun repeated(text: String, times: Long): String {
        if (text.length * times > MAX_TEXT) throw Fault("it makes a text of more than $MAX_TEXT characters")
        return text.repeat(maxOf(0, times.toInt()))
    }

    fun arithmetic(a: Any?, b: Any?, whole: (Long, Long) -> Number, real: (Double, Double) -> Double): Any = when {
        a is Long && b is Long -> whole(a, b)
        a is Number && b is Number -> real(a.toDouble(), b.toDouble())
        else -> throw Fault("a ${kind(a)} and a ${kind(b)} do not compute")
    }

    /** What Python's `str.strip` takes off. */
    fun isSpace(c: Char): Boolean = c in '\t'..'\r' || c in '\u001c'..'\u001f' || c == '\u0085' || Character.isSpaceChar(c)

    fun characters(text: String): List<String> {
        val starts = text.indices.filter { it == 0 || !(text[it].isLowSurrogate() && text[it - 1].isHighSurrogate()) }
        return starts.mapIndexed { i, start -> text.substring(start, starts.getOrElse(i + 1) { text.length }) }
    }

    private fun method(v: Any?, name: String): Callable? = JinjaLibrary.METHODS[name]?.let { f -> Callable { f(v, it) } }

    fun stripped(a: Arguments): (Char) -> Boolean {
        val characters = a.positional.getOrNull(0) ?: return ::isSpace
        return { it in text(characters) }
    }

    fun range(n: List<Long>): List<Long> {
        val (from, until, step) = Triple(if (n.size > 1) n[0] else 0L, if (n.size > 1) n[1] else n[0], n.getOrElse(2) { 1L })
        if (step == 0L) throw Fault("a range with step 0")
        if (Math.abs((until - from) / step) > MAX_ITEMS) throw Fault("a range of more than $MAX_ITEMS items")
        return if (step > 0) (from until until step step).toList() else (from downTo until + 1 step -step).toList()
    }

    fun number(v: Any?): Long = v as? Long ?: throw Fault("a ${kind(v)} is not a whole number")

    fun string(what: String, v: Any?): String = v as? String ?: fault(what, v)

    fun fault(what: String, v: Any?): Nothing = throw Fault("a ${kind(v)} has no '$what'")

    private const val MAX_ITEMS = 100_000
    private const val MAX_TEXT = 10_000_000

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
