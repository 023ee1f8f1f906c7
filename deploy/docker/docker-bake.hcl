variable "REPOSITORY" { default = "shoal" }
variable "VERSION" { default = "0.1.0" }
variable "TORCH_CPU_INDEX" { default = "" } # the package index with torch's CPU builds
variable "BASE" { default = "python:3.11.13-slim-bookworm" }

group "default" { targets = ["cpu", "cuda"] }

target "common" {
  context    = "."
  dockerfile = "deploy/docker/Dockerfile"
  args       = { BASE = BASE, VERSION = VERSION }
}

target "cpu" {
  inherits = ["common"]
  target   = "cpu"
  args     = { TORCH_CPU_INDEX = TORCH_CPU_INDEX }
  tags     = ["${REPOSITORY}:${VERSION}-cpu"]
}

target "cuda" {
  inherits = ["common"]
  target   = "cuda"
  tags     = ["${REPOSITORY}:${VERSION}-cuda"]
}
