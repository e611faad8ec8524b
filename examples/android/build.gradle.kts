// The Android plugin compiles Kotlin itself from 9.0 on; Kotlin's own plugin is here for its version alone.
plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.kotlin.android) apply false
    alias(libs.plugins.kotlin.compose) apply false
}
