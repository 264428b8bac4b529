package edgekv.app

import android.content.ContentResolver
import android.net.Uri
import edgekv.core.ArtifactException
import edgekv.core.CancelledException
import edgekv.screen.Models
import java.io.File
import java.io.IOException

/** Copies an artifact that the system's file picker found into the app's storage, where it is checked. */
class ArtifactImport(
    private val resolver: ContentResolver,
    private val models: Models,
    private val stopped: () -> Boolean,
) {
    /**
     * Copies the directory `tree`.
     *
     * @throws ArtifactException it cannot be read, or is not an artifact
     * @throws CancelledException `stopped` said so
     */
    fun copy(tree: Uri) {
        val root = tree.pathSegments[1]
        val name = root.substringAfterLast('/').substringAfterLast(':').trimStart('.').ifEmpty { "artifact" }
        try {
            models.add(name, ::checkStopped) { part -> copyDirectory(tree, root, part) }
        } catch (e: SecurityException) {
            throw ArtifactException("Cannot read $name: the file picker's permission has ended; choose it again.", e)
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
                    checkStopped()
                    val n = input.read(block)
                    if (n < 0) break
                    output.write(block, 0, n)
                }
            }
        }
    }

    private fun checkStopped() {
        if (stopped()) throw CancelledException()
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
