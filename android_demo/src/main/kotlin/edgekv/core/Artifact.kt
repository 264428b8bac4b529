package edgekv.core

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.security.MessageDigest

/** An opened artifact directory: manifest read, plan and sizes checked; digests on request. */
class Artifact private constructor(val root: File, val manifest: Manifest) {
    val plan get() = manifest.plan

    fun file(name: String) = File(root, name)

    /** @throws ArtifactException when it was exported without programs for `engine` */
    fun backend(engine: String): Backend = manifest.backends[engine] ?: throw ArtifactException(
        "${root.name} has no programs for '$engine' (it has: " +
            "${manifest.backends.keys.sorted().joinToString().ifEmpty { "none" }}); export again with --backend $engine.",
    )

    /** @throws ArtifactException naming the first file whose content is not what the manifest says */
    fun checkDigests(onFile: (String) -> Unit = {}) {
        for (name in manifest.files.keys) {
            onFile(name)
            checkDigest(name)
        }
    }

    /**
     * Compares pieces of each file that runs with those that were exported, as Python does at every
     * load: files of another artifact are found so, a few changed bytes by [checkDigests] alone.
     *
     * @throws ArtifactException a piece is another, or a file cannot be read
     */
    fun checkSamples() {
        for ((name, entry) in manifest.files) {
            if (entry.sample == null) continue
            val found = try {
                sampleHex(file(name))
            } catch (e: IOException) {
                throw ArtifactException("Cannot read $name: ${e.message}; add the model again.", e)
            }
            if (found == entry.sample) continue
            throw ArtifactException(
                "$name is not the file that belongs to this model (its size is right, its content is not); " +
                    "delete the model here and add it again.",
            )
        }
    }

    /**
     * A program's file, its digest checked unless it is large: it says what memory its operators touch.
     *
     * @throws ArtifactException its content is not what the manifest says
     */
    fun program(name: String): File {
        if (manifest.files.getValue(name).size <= CHECKED_BYTES) checkDigest(name)
        return file(name)
    }

    private fun checkDigest(name: String) {
        val found = sha256Hex(file(name))
        val said = manifest.files.getValue(name).sha256
        if (found == said) return
        throw ArtifactException(
            "$name has SHA-256 ${found.take(12)}…, the manifest says ${said.take(12)}…: the file was changed; " +
                "copy or export the artifact again.",
        )
    }

    companion object {
        /**
         * @throws ArtifactException no such directory, not an artifact, another version, a path that
         *     leaves the directory, or a file that is missing or of another size
         */
        fun open(root: File): Artifact {
            val manifest = File(root, Manifest.FILE)
            if (!root.isDirectory) {
                throw ArtifactException("$root is not a directory; choose the directory `edge-kv export` made.")
            }
            if (!manifest.isFile) {
                throw ArtifactException("$root has no ${Manifest.FILE}; it is not an edge-kv artifact.")
            }
            val read = Manifest.read(manifest)
            for ((name, entry) in read.files) check(root, name, entry)
            read.namedFiles.firstOrNull { it !in read.files }?.let {
                throw ArtifactException("$manifest uses '$it' but does not list its size and digest.")
            }
            return Artifact(root, read)
        }

        private const val CHECKED_BYTES = 64L shl 20
        private const val SAMPLES = 64
        private const val SAMPLE = 4096

        private fun check(root: File, name: String, entry: FileEntry) {
            val parts = name.split('/')
            if (name.startsWith("/") || '\\' in name || ".." in parts || name.any { it.isISOControl() }) {
                throw ArtifactException("The manifest names '$name', a path outside the artifact; refused.")
            }
            val file = File(root, name)
            if (!file.isFile) throw ArtifactException("$file is missing; copy or export the artifact again.")
            if (!file.canonicalPath.startsWith(root.canonicalPath + File.separator)) {
                throw ArtifactException("$file is a link that leaves the artifact; refused.")
            }
            if (file.length() != entry.size) {
                throw ArtifactException(
                    "$file has ${file.length()} bytes, the manifest says ${entry.size}; it is cut off or " +
                        "changed; copy or export the artifact again.",
                )
            }
        }

        /** SHA-256 of pieces spread over a file, or of all of a short one: `sample_of` in Python. */
        private fun sampleHex(file: File): String {
            val last = file.length() - SAMPLE
            if (last < SAMPLES * SAMPLE) return sha256Hex(file)
            val pieces = ByteArray(SAMPLES * SAMPLE)
            RandomAccessFile(file, "r").use {
                for (i in 0 until SAMPLES) {
                    it.seek(last * i / (SAMPLES - 1))
                    it.readFully(pieces, i * SAMPLE, SAMPLE)
                }
            }
            return hex(MessageDigest.getInstance("SHA-256").digest(pieces))
        }

        private fun sha256Hex(file: File): String {
            val digest = MessageDigest.getInstance("SHA-256")
            val block = ByteArray(1 shl 20)
            file.inputStream().use { input ->
                while (true) {
                    val n = input.read(block)
                    if (n < 0) break
                    digest.update(block, 0, n)
                }
            }
            return hex(digest.digest())
        }

        private fun hex(digest: ByteArray) = digest.joinToString("") { (it.toInt() and 255).toString(16).padStart(2, '0') }
    }
}
