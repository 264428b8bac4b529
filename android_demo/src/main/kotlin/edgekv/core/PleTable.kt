package edgekv.core

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer

/** Per-layer embeddings, read row by row from their file and never resident. */
class PleTable(private val file: File, private val entry: PleEntry) : Closeable {
    private val channel: java.nio.channels.FileChannel
    private val row: ByteBuffer

    init {
        val small = entry.values <= MAX_VALUES
        val blocks = small && (entry.bits == 32 || entry.block > 0 && entry.values % entry.block == 0L)
        if (entry.bits !in listOf(4, 8, 32) || !blocks) {
            throw ArtifactException(
                "$file is said to store ${entry.bits} bits in blocks of ${entry.block}, which this app does not read; " +
                    "export again.",
            )
        }
        row = ByteBuffer.allocate(entry.rowBytes.toInt()).order(ByteOrder.LITTLE_ENDIAN)
        try {
            channel = RandomAccessFile(file, "r").channel
        } catch (e: IOException) {
            throw ArtifactException("Cannot open $file: ${e.message}.", e)
        }
        val need = entry.rows * entry.rowBytes
        if (channel.size() < need) {
            channel.close()
            throw ArtifactException(
                "$file is shorter than the $need bytes of ${entry.rows} rows; copy or export the artifact again.",
            )
        }
    }

    /**
     * Puts the rows of `ids` for the first `layers` layers, [n, layers, dim], from index 0 of `out`.
     *
     * @throws ArtifactException the file ends before a row does
     */
    fun read(ids: IntArray, layers: Int, out: FloatBuffer) {
        ids.forEachIndexed { i, id ->
            row.clear()
            while (row.hasRemaining()) {
                val at = id * entry.rowBytes + row.position()
                if (channel.read(row, at) < 0) {
                    throw ArtifactException(
                        "$file ends inside the row of token $id; it is cut off; copy or export the artifact again.",
                    )
                }
            }
            dequantise(layers * entry.dim, out, i * layers * entry.dim)
        }
    }

    override fun close() = channel.close()

    private companion object {
        const val MAX_VALUES = 1 shl 24 // of a row
    }

    private fun dequantise(count: Int, out: FloatBuffer, at: Int) {
        var scale = 1f
        for (j in 0 until count) {
            if (entry.bits == 32) {
                out.put(at + j, row.getFloat(4 * j))
                continue
            }
            if (j % entry.block == 0) scale = halfToFloat(row.getShort(entry.dataBytes.toInt() + j / entry.block * 2).toInt())
            val value = when {
                entry.bits == 8 -> row.get(j).toInt()
                j % 2 == 0 -> (row.get(j / 2).toInt() and 15) - 8
                else -> (row.get(j / 2).toInt() shr 4 and 15) - 8
            }
            out.put(at + j, value * scale)
        }
    }
}

/** IEEE half precision in the low 16 bits -> float. */
internal fun halfToFloat(half: Int): Float {
    val sign = half and 0x8000 shl 16
    val exponent = half shr 10 and 31
    val fraction = half and 1023
    val bits = when {
        exponent == 31 -> 0x7f800000 or (fraction shl 13)
        exponent > 0 -> (exponent + 112 shl 23) or (fraction shl 13)
        else -> java.lang.Float.floatToRawIntBits(fraction * 5.9604645e-8f) // subnormal: fraction · 2^-24
    }
    return java.lang.Float.intBitsToFloat(sign or bits)
}
