package edgekv.core

import kotlin.math.exp

/** How ids are drawn; meaning and order as in `edge_kv.runtime.sampling`. */
data class Sampling(
    val temperature: Double = 0.0,
    val topK: Int = 0,
    val topP: Double = 1.0,
    val minP: Double = 0.0,
    val repetitionPenalty: Double = 1.0,
) {
    init {
        fun positive(x: Double) = x > 0 && !x.isInfinite()
        val faults = listOf(
            "temperature $temperature must be 0 (greedy) or a positive number" to (temperature == 0.0 || positive(temperature)),
            "top_k $topK must be 0 (off) or more" to (topK >= 0),
            "top_p $topP must lie above 0 and up to 1" to (topP > 0 && topP <= 1),
            "min_p $minP must lie in 0 … 1" to (minP in 0.0..1.0),
            "repetition_penalty $repetitionPenalty must be a positive number" to positive(repetitionPenalty),
        ).filterNot { it.second }.map { it.first }
        if (faults.isNotEmpty()) throw ConfigException("Sampling: " + faults.joinToString("; ") + ".")
    }
}

/**
 * A seeded sampler; greedy when the temperature is 0. One seed chooses what numpy would choose. Ids in
 * `suppress` are never drawn.
 */
class Sampler(private val options: Sampling, seed: Long? = null, private val suppress: Collection<Int> = emptyList()) {
    private val random: NumpyRandom

    init {
        if (seed != null && seed < 0) throw ConfigException("Sampling: seed $seed must not be negative.")
        random = NumpyRandom(seed ?: (System.nanoTime() and Long.MAX_VALUE))
    }

    /**
     * Chooses an id from float [vocab]; ids in `history` are subject to the penalty.
     *
     * @throws RuntimeFault a logit is NaN or +inf, or all are -inf
     */
    fun choose(given: FloatArray, history: () -> IntArray): Int {
        val logits = allowed(given)
        var top = Float.NEGATIVE_INFINITY
        for (x in logits) top = if (x.isNaN()) x else maxOf(top, x)
        if (top.isNaN() || top.isInfinite()) {
            throw RuntimeFault("The largest logit is $top: the model computed nothing usable; check the artifact's files.")
        }
        val row = if (options.repetitionPenalty == 1.0) logits else penalised(logits, history())
        if (options.temperature == 0.0) return likeliest(row)
        val (ids, weights) = candidates(row)
        val cumulative = DoubleArray(weights.size)
        var total = 0.0
        for (i in weights.indices) {
            total += weights[i]
            cumulative[i] = total
        }
        val at = random.nextDouble() * total
        val chosen = cumulative.indexOfFirst { it > at } // never lands on a weight of 0
        return ids[if (chosen < 0) ids.lastIndex else chosen]
    }

    private fun allowed(logits: FloatArray): FloatArray {
        if (suppress.isEmpty()) return logits
        return logits.copyOf().also { for (id in suppress) if (id < it.size) it[id] = Float.NEGATIVE_INFINITY }
    }

    private fun likeliest(row: FloatArray): Int {
        var best = 0
        for (id in row.indices) if (row[id] > row[best]) best = id
        return best
    }

    /** Ids that survive the filters and their unnormalised probabilities, likeliest first if filtered. */
    private fun candidates(logits: FloatArray): Pair<IntArray, DoubleArray> {
        val top = logits.maxOf { it.toDouble() }
        val weights = DoubleArray(logits.size) { exp((logits[it].toDouble() - top) / options.temperature) }
        var ids = IntArray(logits.size) { it }
        if (options.topK > 0) ids = largest(weights, options.topK)
        if (options.topP < 1.0) {
            val total = ids.sumOf { weights[it] }
            if (options.topK == 0) ids = enough(weights, total)
            var before = 0.0
            val kept = ids.indexOfFirst { id ->
                val out = before >= options.topP * total
                before += weights[id]
                out
            }
            if (kept >= 0) ids = ids.copyOf(kept)
        }
        if (options.minP > 0.0) {
            val limit = options.minP * ids.maxOf { weights[it] }
            ids = ids.filter { weights[it] >= limit }.toIntArray()
        }
        return Pair(ids, DoubleArray(ids.size) { weights[ids[it]] })
    }

    /** A head of the sorted candidates that holds top_p of the probability. */
    private fun enough(weights: DoubleArray, total: Double): IntArray {
        var count = FIRST_CUT
        while (count < weights.size) {
            val ids = largest(weights, count)
            if (ids.sumOf { weights[it] } >= options.topP * total) return ids
            count *= 8
        }
        return largest(weights, weights.size)
    }

    private fun penalised(logits: FloatArray, history: IntArray): FloatArray {
        val out = logits.copyOf()
        val penalty = options.repetitionPenalty.toFloat()
        for (id in history.toSet()) out[id] = if (out[id] > 0) out[id] / penalty else out[id] * penalty
        return out
    }

    private companion object {
        const val FIRST_CUT = 64

        /** Indices of the `count` largest weights, largest first, ties by the lower index. */
        fun largest(weights: DoubleArray, count: Int): IntArray {
            val better = compareBy<Int>({ weights[it] }, { -it })
            if (count >= weights.size) return weights.indices.sortedWith(better.reversed()).toIntArray()
            val heap = java.util.PriorityQueue(count + 1, better)
            for (i in weights.indices) {
                if (heap.size == count && weights[i] <= weights[heap.peek()!!]) continue
                heap.add(i)
                if (heap.size > count) heap.poll()
            }
            return IntArray(count) { heap.poll()!! }.reversedArray()
        }
    }
}
