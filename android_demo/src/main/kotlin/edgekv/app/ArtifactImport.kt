package edgekv.app

import android.content.ContentResolver
import android.net.Uri
import edgekv.core.Artifact
import edgekv.core.ArtifactException
import edgekv.core.CancelledException
import java.io.File
import java.io.IOException

/** Copies an artifact that the system's file picker found into the app's storage, and checks it there. */
class ArtifactImport(
    private val resolver: ContentResolver,
    private val storage: File,
    private val stopped: () -> Boolean,
) {
    /**
     * Copies the directory `tree`; nothing is left behind unless all of it arrived as it was made.
     *
     * @return the name under which it is kept
     * @throws ArtifactException it cannot be read, or is not an artifact
     * @throws CancelledException `stopped` said so
     */
    fun copy(tree: Uri): String {
        val root = tree.pathSegments[1]
        val name = root.substringAfterLast('/').substringAfterLast(':').ifEmpty { "artifact" }
        val part = File(storage, ".$name.part")
        part.deleteRecursively()
        try {
            copyDirectory(tree, root, part)
            Artifact.open(part).checkDigests { if (stopped()) throw CancelledException() }
            val target = File(storage, name)
            target.deleteRecursively()
            if (!part.renameTo(target)) throw IOException("it cannot be renamed")
            return name
        } catch (e: IOException) {
            throw ArtifactException("Cannot copy $name: ${e.message}; is there room?", e)
        } catch (e: SecurityException) {
            throw ArtifactException("Cannot read $name: the file picker's permission has ended; choose it again.", e)
        } finally {
            part.deleteRecursively()
        }
    }

    private fun copyDirectory(tree: Uri, directory: String, to: File) {
        if (!to.mkdirs()) throw IOException("$to cannot be made")
        val columns = arrayOf("document_id", "_display_name", "mime_type")
        val rows = resolver.query(uri(tree, directory, "children"), columns, null, null, null)
            ?: throw IOException("it cannot be listed")
        rows.use {
            while (it.moveToNext()) {
                val (id, name, type) = Triple(it.getString(0), it.getString(1), it.getString(2))
                val target = File(to, File(name).name)
                if (type == DIRECTORY) copyDirectory(tree, id, target) else copyFile(uri(tree, id), target)
            }
        }
    }

    private fun copyFile(from: Uri, to: File) {
        val block = ByteArray(1 shl 20)
        val input = resolver.openInputStream(from) ?: throw IOException("$to cannot be read")
        input.use {
            to.outputStream().use { output ->
                while (true) {
                    if (stopped()) throw CancelledException()
                    val n = input.read(block)
                    if (n < 0) break
                    output.write(block, 0, n)
                }
            }
        }
    }

    /** What DocumentsContract builds; its class is newer than the stubs this is compiled against. */
    private fun uri(tree: Uri, document: String, vararg more: String): Uri {
        val builder = Uri.Builder().scheme("content").authority(tree.authority)
        for (part in listOf("tree", tree.pathSegments[1], "document", document, *more)) builder.appendPath(part)
        return builder.build()
    }

    private companion object {
        const val DIRECTORY = "vnd.android.document/directory"
    }
}
