package edgekv.core

/**
 * `numpy.random.default_rng(seed)`: PCG64 seeded by SeedSequence, so that one seed gives the same
 * text and the same benchmark prompt on a phone and on a desktop.
 *
 * Formulas: O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms"
 * (XSL-RR 128/64), and numpy's bit_generator.pyx.
 */
class NumpyRandom(seed: Long) {
    private var high: Long
    private var low: Long
    private val incrementHigh: Long
    private val incrementLow: Long
    private var spare = 0
    private var hasSpare = false

    init {
        val words = SeedSequence(seed).words(8)
        fun word(i: Int) = (words[2 * i].toLong() and MASK) or (words[2 * i + 1].toLong() shl 32)
        incrementHigh = word(2) shl 1 or (word(3) ushr 63)
        incrementLow = word(3) shl 1 or 1
        high = 0
        low = 0
        step()
        val sum = low + word(1)
        high += word(0) + if (sum.toULong() < low.toULong()) 1 else 0
        low = sum
        step()
    }

    /** Uniform in [0, 1), 53 bits. */
    fun nextDouble(): Double = (nextLong() ushr 11) * (1.0 / (1L shl 53))

    /** Uniform whole numbers in 0 until `bound`, as `integers(0, bound, count)` draws them. */
    fun integers(bound: Int, count: Int): IntArray {
        val range = bound.toLong()
        val threshold = (1L shl 32) % range
        return IntArray(count) {
            if (bound == 1) return@IntArray 0
            var m: Long
            do m = (nextInt().toLong() and MASK) * range while (m and MASK < threshold)
            (m ushr 32).toInt()
        }
    }

    private fun nextInt(): Int {
        hasSpare = !hasSpare
        if (!hasSpare) return spare
        val next = nextLong()
        spare = (next ushr 32).toInt()
        return next.toInt()
    }

    private fun nextLong(): Long {
        step()
        return java.lang.Long.rotateRight(high xor low, (high ushr 58).toInt())
    }

    /** state = state * multiplier + increment, modulo 2^128. */
    private fun step() {
        val product = low * MULTIPLIER_LOW
        val carry = multiplyHigh(low, MULTIPLIER_LOW) + high * MULTIPLIER_LOW + low * MULTIPLIER_HIGH
        low = product + incrementLow
        high = carry + incrementHigh + if (low.toULong() < product.toULong()) 1 else 0
    }

    /** Upper 64 bits of an unsigned product; `Math.multiplyHigh` needs Android 12. */
    private fun multiplyHigh(a: Long, b: Long): Long {
        val aHigh = a ushr 32
        val aLow = a and MASK
        val bHigh = b ushr 32
        val bLow = b and MASK
        val middle = aHigh * bLow + (aLow * bLow ushr 32)
        val lower = aLow * bHigh + (middle and MASK)
        return aHigh * bHigh + (middle ushr 32) + (lower ushr 32)
    }

    private companion object {
        const val MASK = 0xffffffffL
        const val MULTIPLIER_HIGH = 2549297995355413924L
        const val MULTIPLIER_LOW = 4865540595714422341L
    }
}

/** numpy's SeedSequence over one number, without spawning. */
private class SeedSequence(seed: Long) {
    private val pool = IntArray(4)
    private var hash = 0x43b0d7e5

    init {
        val entropy = intArrayOf(seed.toInt(), (seed ushr 32).toInt(), 0, 0)
        for (i in pool.indices) pool[i] = hashed(entropy[i])
        for (source in pool.indices) {
            for (target in pool.indices) {
                if (source != target) pool[target] = mix(pool[target], hashed(pool[source]))
            }
        }
    }

    fun words(count: Int): IntArray {
        var constant = 0x8b51f9dd.toInt()
        return IntArray(count) {
            var value = pool[it % pool.size] xor constant
            constant *= 0x58f38ded
            value *= constant
            value xor (value ushr 16)
        }
    }

    private fun hashed(value: Int): Int {
        var mixed = value xor hash
        hash *= 0x931e8875.toInt()
        mixed *= hash
        return mixed xor (mixed ushr 16)
    }

    private fun mix(x: Int, y: Int): Int {
        val result = x * 0xca01f9dd.toInt() - y * 0x4973f715
        return result xor (result ushr 16)
    }
}
