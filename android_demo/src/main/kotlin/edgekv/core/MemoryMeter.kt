package edgekv.core

import java.io.File
import java.io.IOException

/** Bytes this process holds; null where the system does not tell. */
class Memory(
    /** RssAnon: heap and state; cannot be reclaimed. */
    val anon: Long?,
    /** RssFile: mapped files; clean pages are dropped under pressure. */
    val file: Long?,
    /** VmHWM: the highest resident size since start or `resetPeak`. */
    val peak: Long?,
    /** Resident size with pages shared by n processes counted 1/n. */
    val pss: Long?,
)

/** Reads `/proc`, which Linux and Android share. */
object MemoryMeter {
    private val proc = File("/proc/self")

    /** `pss` walks all maps and costs milliseconds: only on request. */
    fun read(pss: Boolean): Memory {
        val status = fields(File(proc, "status"))
        return Memory(
            anon = status["RssAnon"],
            file = status["RssFile"],
            peak = status["VmHWM"],
            pss = if (pss) fields(File(proc, "smaps_rollup"))["Pss"] else null,
        )
    }

    /** Memory that new work can have without killing others: MemAvailable. */
    fun available(): Long? = fields(File("/proc/meminfo"))["MemAvailable"]

    /** All memory of the machine: MemTotal. */
    fun total(): Long? = fields(File("/proc/meminfo"))["MemTotal"]

    /** Starts the peak anew; false where the kernel does not allow it. */
    fun resetPeak(): Boolean = try {
        File(proc, "clear_refs").writeText("5")
        true
    } catch (e: IOException) {
        false
    }

    /** `Name:  123 kB` lines as bytes; empty when there is no such file. */
    private fun fields(file: File): Map<String, Long> = try {
        file.readLines().mapNotNull { line ->
            val words = line.substringAfter(':').trim().split(' ')
            val kilobytes = if (words.size == 2 && words[1] == "kB") words[0].toLongOrNull() else null
            kilobytes?.let { line.substringBefore(':') to it * 1024 }
        }.toMap()
    } catch (e: IOException) {
        emptyMap()
    }
}
