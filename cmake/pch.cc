// Carries the precompiled header of cmake/Rooms.cmake.
