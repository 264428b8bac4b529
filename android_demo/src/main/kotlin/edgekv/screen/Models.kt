package edgekv.screen

import edgekv.core.Artifact
import edgekv.core.ArtifactException
import edgekv.core.EdgeKvException
import edgekv.core.Manifest
import java.io.File
import java.io.IOException
import java.io.InputStream

/** A model in the app's storage, as the list of models shows it. */
class StoredModel(val name: String, val bytes: Long, val ctx: Int?) {
    val label: String get() = "$name\n${Words.size(bytes)}" + (ctx?.let { " · remembers ${Words.number(it)} tokens" } ?: " · damaged")
}

/** The artifacts in `storage`, one directory each. */
class Models(private val storage: File) {
    fun all(): List<StoredModel> = storage.listFiles().orEmpty()
        .filter { File(it, Manifest.FILE).isFile && !it.name.startsWith(".") }
        .sortedBy { it.name }
        .map { root ->
            val bytes = root.walkBottomUp().filter { it.isFile }.sumOf { it.length() }
            val ctx = try {
                Artifact.open(root).plan.ctx
            } catch (e: EdgeKvException) {
                null
            }
            StoredModel(root.name, bytes, ctx)
        }

    fun folder(name: String) = File(storage, name)

    /** @throws UserFault it cannot be deleted */
    fun delete(name: String) {
        if (!folder(name).deleteRecursively()) throw UserFault("$name could not be deleted.")
    }

    /**
     * Puts a model there: `copy` fills a directory, which is then checked in full. Nothing is left
     * behind unless all of it arrived as it was made.
     *
     * @throws ArtifactException it cannot be read or kept, or is not an artifact
     */
    fun add(name: String, stopped: () -> Unit = {}, copy: (File) -> Unit) {
        val part = File(storage, ".$name.part")
        part.deleteRecursively()
        try {
            copy(part)
            Artifact.open(part).checkDigests { stopped() }
            val target = folder(name)
            target.deleteRecursively()
            if (!part.renameTo(target)) throw IOException("it cannot be renamed")
        } catch (e: IOException) {
            throw ArtifactException("Cannot copy $name: ${e.message}; is there room?", e)
        } finally {
            part.deleteRecursively()
        }
    }

    /** Copies a model whose files `open` reads, by the paths that its manifest lists. */
    fun addBundled(name: String, open: (String) -> InputStream) = add(name) { part ->
        fun copy(path: String) {
            val to = File(part, path)
            to.parentFile?.mkdirs()
            open(path).use { from -> to.outputStream().use { from.copyTo(it) } }
        }
        copy(Manifest.FILE)
        Manifest.read(File(part, Manifest.FILE)).files.keys.forEach(::copy)
    }
}
