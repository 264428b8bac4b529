package edgekv.core

/** Typed look-ups in a JSON object: what is missing or of another kind is refused by name. */
class Fields(private val map: Map<*, *>, private val where: String) {
    val names: Set<String> get() = map.keys.map { it as String }.toSet()

    fun has(name: String) = map[name] != null

    fun text(name: String): String = map[name] as? String ?: refuse(name, "text")

    fun textOrNull(name: String): String? = if (has(name)) text(name) else null

    fun long(name: String): Long = map[name] as? Long ?: refuse(name, "a whole number")

    fun int(name: String): Int =
        long(name).let { if (it in Int.MIN_VALUE..Int.MAX_VALUE) it.toInt() else refuse(name, "a smaller number") }

    fun double(name: String): Double = (map[name] as? Number ?: refuse(name, "a number")).toDouble()

    fun flag(name: String): Boolean = map[name] as? Boolean ?: refuse(name, "true or false")

    fun flagOr(name: String, default: Boolean): Boolean = if (has(name)) flag(name) else default

    fun list(name: String): List<*> = map[name] as? List<*> ?: refuse(name, "a list")

    fun ints(name: String): List<Int> = list(name).map { (it as? Long)?.toInt() ?: refuse(name, "whole numbers") }

    fun texts(name: String): List<String> = list(name).map { it as? String ?: refuse(name, "texts") }

    fun tree(name: String): Map<*, *> = map[name] as? Map<*, *> ?: refuse(name, "an object")

    fun fields(name: String) = Fields(tree(name), "$where: $name")

    fun fieldsOrNull(name: String): Fields? = if (has(name)) fields(name) else null

    fun listOfFields(name: String): List<Fields> = list(name).mapIndexed { i, item ->
        Fields(item as? Map<*, *> ?: refuse(name, "objects"), "$where: $name[$i]")
    }

    /** @throws ArtifactException when there is a field that is not one of `known` */
    fun only(vararg known: String) {
        val odd = (names - known.toSet()).minOrNull() ?: return
        throw ArtifactException("$where has a field '$odd', which this app does not know; update the app or export again.")
    }

    private fun refuse(name: String, wanted: String): Nothing {
        val found = if (map.containsKey(name)) "is ${Json.compact(map[name]).take(40)}" else "is missing"
        throw ArtifactException("$where: $name $found, expected $wanted; export the artifact again.")
    }
}
