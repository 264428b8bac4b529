package edgekv.app

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.util.AttributeSet
import android.view.View
import edgekv.core.Memory

/** Memory over the last minutes: anonymous below, mapped files on top of it, up to the peak seen. */
class MemoryGraph(context: Context, attributes: AttributeSet?) : View(context, attributes) {
    private val anon = Paint().apply { color = context.resources.getColor(R.color.anonymous) }
    private val file = Paint().apply { color = context.resources.getColor(R.color.file_pages) }
    private var samples: List<Memory> = emptyList()

    fun show(samples: List<Memory>) {
        this.samples = samples
        invalidate()
    }

    override fun onDraw(canvas: Canvas) {
        val top = samples.maxOfOrNull { (it.anon ?: 0) + (it.file ?: 0) }?.coerceAtLeast(1) ?: return
        val step = width.toFloat() / CAPACITY
        samples.forEachIndexed { i, sample ->
            val left = width - (samples.size - i) * step
            val split = height * (1 - (sample.anon ?: 0).toFloat() / top)
            val upper = split - height * (sample.file ?: 0).toFloat() / top
            canvas.drawRect(left, split, left + step, height.toFloat(), anon)
            canvas.drawRect(left, upper, left + step, split, file)
        }
    }

    companion object {
        /** Samples that fit the width. */
        const val CAPACITY = 240
    }
}
