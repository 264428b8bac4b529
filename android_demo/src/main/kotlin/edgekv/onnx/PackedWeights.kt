package edgekv.onnx

import ai.onnxruntime.OrtSession.SessionOptions
import edgekv.core.Artifact
import edgekv.core.EdgeKvException
import edgekv.core.Json
import edgekv.core.JsonException
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.security.MessageDigest

/**
 * Weights packed once for this device, so that later loads map them instead of building a heap.
 *
 * onnxruntime rearranges every matrix for the CPU. It can write the result to a file and map it at
 * the next load: packed weights are then clean file pages that the kernel may drop. Both programs
 * point into the one file that `decode` was packed into. The method and its reasons are those of
 * `edge_kv.runtime.packed`.
 */
internal class PackedWeights(
    private val artifact: Artifact,
    cache: File,
    version: String,
    private val packFrom: Long = WORTH_PACKING,
    private val load: (File, SessionOptions.() -> Unit) -> Unit,
) {
    private val programs = artifact.backend(OnnxSession.ENGINE).programs.mapValues { it.value.file }
    private val files = artifact.backend(OnnxSession.ENGINE).files
    private val weights = files.filter { it !in programs.values }.sumOf { artifact.manifest.files.getValue(it).size }
    private val home = File(cache, key(version))

    /** The programs packed for this device, made when missing; null where there is nothing to gain. */
    fun programs(): Map<String, File>? {
        if (weights < packFrom) return null
        return try {
            valid() ?: make()
        } catch (e: IOException) {
            null // no room, or nowhere to write: loaded to the heap instead
        } catch (e: EdgeKvException) {
            null
        }
    }

    /** Forgets packed programs that could not be loaded; the next start makes them anew. */
    fun discard() {
        home.deleteRecursively()
    }

    /** The programs that were packed before; null when a file is not as it was recorded. */
    fun valid(): Map<String, File>? {
        val record = try {
            Json.parse(File(home, RECORD).readBytes()) as? Map<*, *>
        } catch (e: IOException) {
            null
        } catch (e: JsonException) {
            null
        }
        val packed = File(home, WEIGHTS)
        if (record == null || record["weights"] != listOf(packed.length(), packed.lastModified())) return null
        val found = programs.mapValues { File(home, "${it.key}.onnx") }
        return found.takeIf { it.all { (name, file) -> file.length() == record[name] } }
    }

    private fun make(): Map<String, File> {
        val part = File(home.path + ".part")
        part.deleteRecursively()
        if (!part.mkdirs()) throw IOException("$part cannot be made")
        try {
            if (part.usableSpace < ROOM * weights) throw IOException("too little room in $part")
            val decode = File(part, "decode.onnx")
            save(programs.getValue("decode"), decode, "session.save_external_prepacked_constant_initializers")
            val known = align(File(part, WEIGHTS), OnnxFile.externalData(decode.readBytes()))
            val work = File(part, "work") // takes the weights that come with other programs: known already
            work.mkdir()
            val record = LinkedHashMap<String, Any?>()
            for ((name, file) in programs) {
                val graph = if (name == "decode") decode else File(work, "$name.onnx")
                if (graph !== decode) save(file, graph, "session.disable_prepacking")
                val rewritten = OnnxFile.replaceExternalData(graph.readBytes(), known)
                File(part, "$name.onnx").writeBytes(rewritten)
                record[name] = rewritten.size
            }
            work.deleteRecursively()
            val packed = File(part, WEIGHTS)
            record["weights"] = listOf(packed.length(), packed.lastModified())
            File(part, RECORD).writeText(Json.write(record))
            home.deleteRecursively()
            if (!part.renameTo(home)) throw IOException("$part cannot be renamed")
        } finally {
            part.deleteRecursively()
        }
        return valid() ?: throw IOException("$home was changed while it was written")
    }

    /** Has onnxruntime write its optimised form of a program, weights beside it. */
    private fun save(program: String, to: File, setting: String) = load(artifact.file(program)) {
        setOptimizedModelFilePath(to.path)
        addConfigEntry("session.optimized_model_external_initializers_file_name", WEIGHTS)
        addConfigEntry("session.optimized_model_external_initializers_min_size_in_bytes", "$INLINE_BYTES")
        addConfigEntry(setting, "1")
    }

    /**
     * Appends aligned copies of all pieces that onnxruntime wrote at odd offsets: kernels find the
     * parts of a packed matrix by rounding addresses up, so that a shifted copy is garbage.
     */
    private fun align(file: File, entries: Map<String, Entries>) = RandomAccessFile(file, "rw").use { f ->
        fun moved(offset: Long, length: Int): Long {
            if (offset + length > f.length()) throw IOException("$file is cut off; is the disk full?")
            if (offset % ALIGNMENT == 0L) return offset
            val piece = ByteArray(length)
            f.seek(offset)
            f.readFully(piece)
            val begin = (f.length() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT
            f.channel.write(ByteBuffer.wrap(piece), begin)
            return begin
        }
        entries.mapValues { (_, tensor) ->
            tensor.mapValues { (entry, value) ->
                when {
                    entry == "offset" -> moved(value.toLong(), tensor.getValue("length").toInt()).toString()
                    entry.startsWith("prepacked") -> value.split("|").mapIndexed { i, blob ->
                        if (i == 0) return@mapIndexed blob
                        val (offset, length, check) = blob.split(";")
                        "${moved(offset.toLong(), length.toInt())};$length;$check"
                    }.joinToString("|")
                    else -> value
                }
            }
        }
    }

    /** What packed weights depend on: the engine, the kind of CPU, and the files they are made of. */
    private fun key(version: String): String {
        val digest = MessageDigest.getInstance("SHA-256")
        val cpu = try {
            File("/proc/cpuinfo").readLines().filter { line -> CPU_FACTS.any(line::startsWith) }.distinct()
        } catch (e: IOException) {
            emptyList()
        }
        for (part in listOf(version) + cpu + files.sorted().map { artifact.manifest.files.getValue(it).sha256 }) {
            digest.update(part.toByteArray())
            digest.update(0)
        }
        return digest.digest().take(16).joinToString("") { (it.toInt() and 255).toString(16).padStart(2, '0') }
    }

    companion object {
        /** Bytes of weights below which packing is not worth a file. */
        const val WORTH_PACKING = 64L shl 20
        private const val WEIGHTS = "weights.bin"
        private const val RECORD = "packed.json"
        private const val ROOM = 3 // free disk asked for, in weight files
        private const val ALIGNMENT = 4096
        private const val INLINE_BYTES = 1024 // smaller weights stay inside the program
        private val CPU_FACTS = listOf("model name", "flags", "CPU implementer", "CPU part", "Features")
    }
}
