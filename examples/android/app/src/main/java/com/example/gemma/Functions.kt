package com.example.gemma

import android.content.ActivityNotFoundException
import android.content.Context
import android.content.Intent
import android.hardware.camera2.CameraAccessException
import android.hardware.camera2.CameraCharacteristics
import android.hardware.camera2.CameraManager
import android.provider.AlarmClock
import org.json.JSONObject

/** What the functions that `assistant.json` declares do on this phone, and say of it. */
class Functions(
    private val context: Context,
) {
    fun run(
        name: String,
        arguments: JSONObject,
    ): String =
        when (name) {
            "set_timer" -> setTimer(arguments.getInt("minutes"))
            "set_flashlight" -> setFlashlight(arguments.getBoolean("on"))
            else -> "there is no function $name"
        }

    private fun setTimer(minutes: Int): String {
        val timer =
            Intent(AlarmClock.ACTION_SET_TIMER)
                .putExtra(AlarmClock.EXTRA_LENGTH, minutes * 60)
                .putExtra(AlarmClock.EXTRA_SKIP_UI, true)
                .addFlags(Intent.FLAG_ACTIVITY_NEW_TASK)
        return try {
            context.startActivity(timer)
            "a timer of $minutes minutes runs"
        } catch (_: ActivityNotFoundException) {
            "this phone has no clock that sets timers"
        }
    }

    private fun setFlashlight(on: Boolean): String {
        val cameras = context.getSystemService(CameraManager::class.java)
        return try {
            val light =
                cameras.cameraIdList.firstOrNull { camera ->
                    val has = CameraCharacteristics.FLASH_INFO_AVAILABLE
                    cameras.getCameraCharacteristics(camera).get(has) == true
                } ?: return "this phone has no flashlight"
            cameras.setTorchMode(light, on)
            "the flashlight is ${if (on) "on" else "off"}"
        } catch (_: CameraAccessException) {
            "another app uses the camera"
        }
    }
}
