{{/* The name of the RayService and the beginning of all others. KubeRay makes a cluster's name of it, with 6 letters
more, and names of Services of that: 40 characters leave room. */}}
{{- define "shoal.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- end -}}
{{- $name = trunc 40 $name | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "\n\nfullnameOverride: KubeRay takes no RayService called %q: give a name that begins with a letter and has letters, digits and dashes only" $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Labels by which this release's pods are found. app.kubernetes.io/name of pods is KubeRay's, whose own Services
select by it. Nothing here may change with the chart's version: another pod template is another Ray cluster. */}}
{{- define "shoal.podLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: shoal
{{- end -}}

{{- define "shoal.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
{{ include "shoal.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "shoal.gatewayService" -}}
{{ include "shoal.fullname" . }}-gateway
{{- end -}}

{{- define "shoal.adminService" -}}
{{ include "shoal.fullname" . }}-admin
{{- end -}}

{{- define "shoal.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "shoal.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* The secret that holds the keys file; empty where there are no keys. */}}
{{- define "shoal.keysSecret" -}}
{{- with .Values.auth -}}
{{- if and .keys .existingSecret -}}
{{- fail "\n\nauth: keys and existingSecret are both set: the keys are in a secret of yours, or in the values" -}}
{{- end -}}
{{- if and (or .keys .existingSecret) .keysFile -}}
{{- fail "\n\nauth.keysFile: the chart sets it where there is a secret: remove it, or existingSecret and keys" -}}
{{- end -}}
{{- if .keys -}}
{{- include "shoal.fullname" $ -}}-keys
{{- else -}}
{{- .existingSecret -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "shoal.image" -}}
{{- $hasGpus := false -}}
{{- range .Values.models -}}
{{- if gt (dig "perRank" 1 (default (dict "perRank" 0) .gpu) | int) 0 -}}{{- $hasGpus = true -}}{{- end -}}
{{- end -}}
{{- $tag := .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion (ternary "cuda" "cpu" $hasGpus)) -}}
{{- ternary (printf "%s@%s" .Values.image.repository .Values.image.digest) (printf "%s:%s" .Values.image.repository $tag) (ne .Values.image.digest "") -}}
{{- end -}}

{{/* A block of values as shoal's configuration: max_model_len for maxModelLen. What has keys of the user's own stays. */}}
{{- define "shoal.snake" -}}
{{- $block := dict -}}
{{- range $key, $value := . -}}
{{- if and (kindIs "map" $value) (not (has $key (list "labels" "options" "weights" "gatewayLabels"))) -}}
{{- $_ := set $block (snakecase $key) (include "shoal.snake" $value | fromJson) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $_ := set $block (snakecase $key) $value -}}
{{- end -}}
{{- end -}}
{{- toJson $block -}}
{{- end -}}
