package edgekv.core

import java.util.PriorityQueue

/**
 * Byte pair encoding as Hugging Face `tokenizers` does it: of all neighbours that merge, the pair
 * with the lowest rank first, the leftmost of equals; characters without a token fall back to
 * their bytes, and without those to the unknown token.
 */
class Bpe(
    private val vocabulary: Vocabulary,
    private val unknown: Int,
    private val fuseUnknown: Boolean,
    private val byteFallback: Boolean,
    private val ignoreMerges: Boolean,
) {
    private var keys = LongArray(1 shl 12) // left id, right id; open addressing
    private var ranks = IntArray(1 shl 12) // rank + 1; 0: empty
    private val made = IntList() // what the merge of a rank makes

    /** Adds the next merge; false when a part or the whole is not a token. */
    fun add(left: String, right: String): Boolean {
        val (a, b, whole) = Triple(vocabulary.id(left), vocabulary.id(right), vocabulary.id(left + right))
        if (a < 0 || b < 0 || whole < 0) return false
        made.add(whole)
        if (2 * made.size > keys.size) grow()
        put(pair(a, b), made.size)
        return true
    }

    /** Appends the ids of one word to `out`. */
    fun encode(word: String, out: IntList) {
        if (ignoreMerges) {
            val id = vocabulary.id(word)
            if (id >= 0) return out.add(id)
        }
        val symbols = characters(word)
        merge(symbols.toArray(), out)
    }

    private fun characters(word: String): IntList {
        val ids = IntList()
        var at = 0
        var unknownPending = false
        while (at < word.length) {
            val next = at + Character.charCount(word.codePointAt(at))
            val character = word.substring(at, next)
            at = next
            val id = vocabulary.id(character)
            if (id >= 0) {
                unknownPending = false
                ids.add(id)
                continue
            }
            val bytes = if (byteFallback) character.toByteArray().map { vocabulary.id(byteToken(it)) } else listOf(-1)
            if (bytes.all { it >= 0 }) {
                bytes.forEach(ids::add)
            } else if (unknown >= 0 && !(fuseUnknown && unknownPending)) {
                ids.add(unknown)
                unknownPending = true
            }
        }
        return ids
    }

    private fun merge(ids: IntArray, out: IntList) {
        val previous = IntArray(ids.size) { it - 1 }
        val next = IntArray(ids.size) { if (it + 1 < ids.size) it + 1 else -1 }
        val gone = BooleanArray(ids.size)
        val queue = PriorityQueue<Long>() // rank, then position

        fun offer(at: Int) {
            val after = if (at < 0) -1 else next[at]
            if (after < 0) return
            val rank = rank(ids[at], ids[after])
            if (rank >= 0) queue.add(rank.toLong() shl 32 or at.toLong())
        }
        for (i in ids.indices) offer(i)
        while (true) {
            val top = queue.poll() ?: break
            val at = top.toInt()
            val whole = made[(top ushr 32).toInt()]
            val right = if (gone[at]) -1 else next[at]
            if (right < 0) continue
            val rank = rank(ids[at], ids[right])
            if (rank < 0 || made[rank] != whole) continue // a neighbour was merged meanwhile
            ids[at] = whole
            gone[right] = true
            next[at] = next[right]
            if (next[at] >= 0) previous[next[at]] = at
            offer(previous[at])
            offer(at)
        }
        for (i in ids.indices) if (!gone[i]) out.add(ids[i])
    }

    private fun rank(left: Int, right: Int): Int {
        val key = pair(left, right)
        var slot = slot(key)
        while (ranks[slot] != 0) {
            if (keys[slot] == key) return ranks[slot] - 1
            slot = slot + 1 and keys.size - 1
        }
        return -1
    }

    private fun put(key: Long, rank: Int) {
        var slot = slot(key)
        while (ranks[slot] != 0 && keys[slot] != key) slot = slot + 1 and keys.size - 1
        keys[slot] = key
        ranks[slot] = rank
    }

    private fun grow() {
        val (oldKeys, oldRanks) = Pair(keys, ranks)
        keys = LongArray(2 * oldKeys.size)
        ranks = IntArray(2 * oldKeys.size)
        for (i in oldKeys.indices) if (oldRanks[i] != 0) put(oldKeys[i], oldRanks[i])
    }

    private fun pair(left: Int, right: Int) = left.toLong() shl 32 or right.toLong()

    private fun slot(key: Long): Int {
        val mixed = key * -0x61c8864680b583ebL // 2^64 over the golden ratio
        return (mixed ushr 32).toInt() and keys.size - 1
    }

    companion object {
        /** How a vocabulary spells a byte: `<0xE2>`. */
        fun byteToken(byte: Byte): String =
            "<0x" + (byte.toInt() and 255).toString(16).uppercase().padStart(2, '0') + ">"
    }
}
