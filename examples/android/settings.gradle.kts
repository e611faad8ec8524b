pluginManagement {
    repositories {
        google()
        mavenCentral()
        gradlePluginPortal()
    }
}

dependencyResolutionManagement {
    repositoriesMode = RepositoriesMode.FAIL_ON_PROJECT_REPOS
    repositories {
        google() // LiteRT-LM is here, and not on Maven Central
        mavenCentral()
    }
}

rootProject.name = "gemma"
include(":app")
