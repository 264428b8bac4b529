package edgekv.core

/** Typed, bounded look-ups in a JSON object: what is missing, of another kind or out of range is refused by name. */
class Fields(private val map: Map<*, *>, private val where: String) {
    val names: Set<String> get() = map.keys.map { it as String }.toSet()

    /** Whether there is a value; null is none. */
    fun has(name: String) = map[name] != null

    fun text(name: String, longest: Int = Int.MAX_VALUE): String =
        (map[name] as? String)?.takeIf { it.length <= longest } ?: refuse(name, "text of at most $longest characters")

    fun textOrNull(name: String): String? = if (has(name)) text(name) else null

    /** A text that `pattern` matches as a whole. */
    fun text(name: String, pattern: Regex): String =
        (map[name] as? String)?.takeIf(pattern::matches) ?: refuse(name, "text like ${pattern.pattern}")

    fun long(name: String, range: LongRange = Long.MIN_VALUE..Long.MAX_VALUE): Long =
        (map[name] as? Long)?.takeIf { it in range } ?: refuse(name, wholeNumber(range))

    fun int(name: String, range: IntRange = Int.MIN_VALUE..Int.MAX_VALUE): Int =
        long(name, range.first.toLong()..range.last.toLong()).toInt()

    fun intOrNull(name: String, range: IntRange = Int.MIN_VALUE..Int.MAX_VALUE): Int? =
        if (map.containsKey(name) && map[name] == null) null else int(name, range)

    fun double(name: String, range: ClosedFloatingPointRange<Double> = -Double.MAX_VALUE..Double.MAX_VALUE): Double =
        (map[name] as? Number)?.toDouble()?.takeIf { it in range }
            ?: refuse(name, "a number in ${range.start} … ${range.endInclusive}")

    fun flag(name: String): Boolean = map[name] as? Boolean ?: refuse(name, "true or false")

    fun flagOr(name: String, default: Boolean): Boolean = if (has(name)) flag(name) else default

    fun list(name: String, longest: Int = Int.MAX_VALUE): List<*> =
        (map[name] as? List<*>)?.takeIf { it.size <= longest } ?: refuse(name, "a list of at most $longest")

    fun ints(name: String, range: IntRange = Int.MIN_VALUE..Int.MAX_VALUE, longest: Int = Int.MAX_VALUE): List<Int> =
        list(name, longest).map { item ->
            (item as? Long)?.takeIf { it in range.first..range.last }?.toInt() ?: refuse(name, "a list of whole numbers")
        }

    fun texts(name: String, longest: Int = Int.MAX_VALUE): List<String> =
        list(name, longest).map { it as? String ?: refuse(name, "a list of texts") }

    fun tree(name: String): Map<*, *> = map[name] as? Map<*, *> ?: refuse(name, "an object")

    fun fields(name: String) = Fields(tree(name), "$where: $name")

    /** The object of that name; null where the field is null, which it must be said to be. */
    fun fieldsOrNull(name: String): Fields? = if (map.containsKey(name) && map[name] == null) null else fields(name)

    fun listOfFields(name: String, longest: Int = Int.MAX_VALUE): List<Fields> =
        list(name, longest).mapIndexed { i, item ->
            Fields(item as? Map<*, *> ?: refuse(name, "a list of objects"), "$where: $name[$i]")
        }

    /** What `read` makes of every entry of this object, whose keys `pattern` matches. */
    fun <T> entries(pattern: Regex, read: (Fields) -> T): Map<String, T> {
        names.firstOrNull { !pattern.matches(it) }?.let { throw ArtifactException("$where has an odd name '${it.take(40)}'; export again.") }
        return names.associateWith { read(fields(it)) }
    }

    /** @throws ArtifactException when there is a field that is not one of `known` */
    fun only(vararg known: String) {
        val odd = (names - known.toSet()).minOrNull() ?: return
        throw ArtifactException("$where has a field '$odd', which this app does not know; update the app or export again.")
    }

    fun refuse(name: String, wanted: String): Nothing {
        val found = if (map.containsKey(name)) "is ${Json.write(map[name]).take(40)}" else "is missing"
        throw ArtifactException("$where: $name $found, expected $wanted; export the artifact again.")
    }

    private fun wholeNumber(range: LongRange): String {
        val low = if (range.first > Int.MIN_VALUE) " from ${range.first}" else ""
        return "a whole number$low" + if (range.last < Long.MAX_VALUE) " up to ${range.last}" else ""
    }
}
