{{/* The environment of every Ray container, as a list. Ray Serve reads it when it is imported, in every process. */}}
{{- define "shoal.env" -}}
{{- $env := dict
  "RAY_USAGE_STATS_ENABLED" "0"
  "RAY_SERVE_ENABLE_HA_PROXY" "1"
  "RAY_SERVE_HAPROXY_BINARY_PATH" "/opt/shoal/bin/haproxy"
  "RAY_SERVE_THROUGHPUT_OPTIMIZED" "1"
  "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S" "2"
  "RAY_worker_niceness" "0"
  "RAY_health_check_initial_delay_ms" "1000"
  "RAY_health_check_period_ms" "1000"
  "RAY_health_check_timeout_ms" "2000"
  "RAY_health_check_failure_threshold" "3"
  "HOME" "/tmp"
  "XDG_CACHE_HOME" "/cache"
  "SHOAL_CACHE_DIR" "/cache/shoal"
  "HF_HOME" "/cache/huggingface"
  "TRITON_CACHE_DIR" "/cache/triton"
  "SHOAL_HEADER_TIMEOUT_MS" (default 10 .Values.http.headerTimeout | float64 | mulf 1000 | int | toString)
-}}
{{- with .Values.hub.endpoint -}}{{- $_ := set $env "HF_ENDPOINT" . -}}{{- end -}}
{{- if ne .Values.ray.auth.mode "token" -}}{{- $_ := set $env "RAY_AUTH_MODE" "disabled" -}}{{- end -}}
{{- $env = merge (dict) .Values.ray.env $env -}}
{{- range $name := keys $env | sortAlpha }}
- {name: {{ $name }}, value: {{ get $env $name | quote }}}
{{- end }}
{{- with .Values.hub.tokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- with .Values.pods.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Seconds that a pod may take to finish its streams. */}}
{{- define "shoal.drainTimeout" -}}
{{- $longest := 1 -}}
{{- range .Values.models -}}
{{- $longest = max $longest (default 300 .drainTimeout | float64 | ceil | int) -}}
{{- end -}}
{{- .Values.pods.drainTimeout | default $longest | float64 | ceil | int -}}
{{- end -}}

{{/* Volumes of weights, each once: [{name, claimName, subPath, mountPath, readOnly}] as JSON. */}}
{{- define "shoal.stores" -}}
{{- $stores := dict -}}
{{- range $index, $model := .Values.models -}}
{{- with $model.storage -}}
{{- $store := dict "claimName" .claimName "subPath" (default "" .subPath) "mountPath" .mountPath "readOnly" (dig "readOnly" true .) -}}
{{- $other := get $stores .mountPath | default $store -}}
{{- if ne (toJson $store) (toJson $other) -}}
{{- fail (printf "\n\nmodels[%d] (%s): storage.mountPath %s is that of another volume: choose another path" $index $model.name .mountPath) -}}
{{- end -}}
{{- $_ := set $stores .mountPath $store -}}
{{- end -}}
{{- end -}}
{{- $named := list -}}
{{- range $index, $path := keys $stores | sortAlpha -}}
{{- $named = append $named (merge (dict "name" (printf "weights-%d" $index)) (get $stores $path)) -}}
{{- end -}}
{{- toJson (dict "stores" $named) -}}
{{- end -}}

{{/* A pod template, for {root, component, resources, gpus, gpuResource, place, probes, ports, hasGateways}. */}}
{{- define "shoal.podTemplate" -}}
{{- $values := .root.Values -}}
{{- $drain := include "shoal.drainTimeout" .root | int -}}
{{- $stores := (include "shoal.stores" .root | fromJson).stores -}}
{{- $keys := ternary (include "shoal.keysSecret" .root) "" .hasGateways -}}
metadata:
  labels:
    {{- merge (include "shoal.podLabels" .root | fromYaml) (dict "app.kubernetes.io/component" .component) $values.pods.labels | toYaml | nindent 4 }}
  {{- with $values.pods.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "shoal.serviceAccount" .root }}
  automountServiceAccountToken: {{ .hasToken }}
  terminationGracePeriodSeconds: {{ add $drain 30 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.pods.podSecurityContext }}
  securityContext: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- range $key := list "priorityClassName" "runtimeClassName" "schedulerName" }}
  {{- with get $values.pods $key }}
  {{ $key }}: {{ . }}
  {{- end }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with get $.place $key }}
  {{ $key }}: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "shoal.image" .root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      ports:
        {{- range .ports }}
        - {name: {{ .name }}, containerPort: {{ .port }}}
        {{- end }}
      env: {{- include "shoal.env" .root | nindent 8 }}
      resources: {{- include "shoal.resources" . | nindent 8 }}
      {{- with $values.pods.securityContext }}
      securityContext: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- range $key := list "startup" "readiness" "liveness" }}
      {{- with get $.probes $key }}
      {{ $key }}Probe: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [shoal, drain, --timeout, {{ $drain | quote }}]
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: cache, mountPath: /cache}
        {{- if $keys }}
        - {name: keys, mountPath: /etc/shoal/keys, readOnly: true}
        {{- end }}
        {{- range $stores }}
        - name: {{ .name }}
          mountPath: {{ .mountPath }}
          readOnly: {{ .readOnly }}
          {{- with .subPath }}
          subPath: {{ . }}
          {{- end }}
        {{- end }}
        {{- with $values.pods.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.pods.tmpSize }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $values.pods.shmSize }}}
    - name: cache
      {{- if $values.hub.cache.claimName }}
      persistentVolumeClaim: {claimName: {{ $values.hub.cache.claimName }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.hub.cache.size }}}
      {{- end }}
    {{- if $keys }}
    - name: keys # mounted as a folder, so that a change arrives
      secret: {secretName: {{ $keys }}, defaultMode: 0440}
    {{- end }}
    {{- range $stores }}
    - name: {{ .name }}
      persistentVolumeClaim: {claimName: {{ .claimName }}, readOnly: {{ .readOnly }}}
    {{- end }}
    {{- with $values.pods.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Requests and limits of a container, the same: such a pod is the last to be evicted. */}}
{{- define "shoal.resources" -}}
{{- $amounts := dict "cpu" (toString .resources.cpu) "memory" .resources.memory -}}
{{- with .resources.ephemeralStorage -}}{{- $_ := set $amounts "ephemeral-storage" . -}}{{- end -}}
{{- if gt (default 0 .gpus | int) 0 -}}{{- $_ := set $amounts .gpuResource (toString .gpus) -}}{{- end -}}
{{- toYaml (dict "requests" $amounts "limits" $amounts) -}}
{{- end -}}
