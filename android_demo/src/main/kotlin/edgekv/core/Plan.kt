package edgekv.core

/**
 * One preallocated tensor of state [slots, heads, dim], row-major, as the manifest describes it.
 *
 * Row i stands for positions i·stride … i·stride + stride - 1 and lies in slot i mod slots. A step at
 * position p looks back on `keep` positions, its own included; on all of them when `keep` is 0.
 */
class Table(
    val name: String,
    val heads: Int,
    val dim: Int,
    val slots: Int,
    val stride: Int,
    val keep: Int,
    val dtype: String,
) {
    val rowBytes: Long = heads.toLong() * dim * BYTES.getValue(dtype)

    /** Whether programs take it as a prefix of its live rows; they take others whole. */
    val grows get() = keep == 0 && slots > 1

    /** Slots to bind so that every row that a step up to position end - 1 touches is in view. */
    fun live(end: Int): Int {
        if (!grows) return slots
        val rows = (end.toLong() + stride - 2) / stride + 1
        return minOf(slots.toLong(), (rows + LIVE_STEP - 1) / LIVE_STEP * LIVE_STEP).toInt()
    }

    /** Rows that a snapshot at `pos` keeps: the complete ones that were not overwritten. */
    fun held(pos: Int, written: Int): IntRange {
        val stop = pos / stride
        return minOf(oldest(written), stop) until stop
    }

    /** The lowest position but 0 at which a step may start after `written` positions; 0: any. */
    fun earliest(written: Int): Int = oldest(written).let { if (it > 0) it + keep - 1 else 0 }

    /** Whether a step may start at `to`: everything it looks back on is still there. */
    fun canResume(to: Int, written: Int): Boolean = to == 0 || to >= earliest(written)

    private fun oldest(written: Int): Int = if (keep > 0) maxOf(0, written - slots) else 0

    companion object {
        val BYTES = mapOf("f32" to 4, "f16" to 2, "int8" to 1)
        private const val LIVE_STEP = 256
    }
}

/**
 * All state of one artifact at its context length; what it is made of was decided by the exporter.
 *
 * `decode` takes up to `drafts` tokens behind the first; this app feeds it one.
 */
class Plan(val ctx: Int, val chunk: Int, val kv: String, val tables: List<Table>, val drafts: Int = 0) {
    val bytes: Long get() = tables.sumOf { it.slots * it.rowBytes }

    /** Bytes of state that hold rows once `depth` positions were written. */
    fun touched(depth: Int): Long =
        tables.sumOf { minOf((depth.toLong() + it.stride - 1) / it.stride, it.slots.toLong()) * it.rowBytes }

    /** The lowest position but 0 that decoding may go on at after `written` positions; 0: any. */
    fun earliest(written: Int): Int = tables.maxOfOrNull { it.earliest(written) } ?: 0

    /** Whether decoding may go on at `to` after `written` positions were written. */
    fun canRewind(to: Int, written: Int): Boolean = to in 0..written && tables.all { it.canResume(to, written) }
}
