{{/* What the models need: {"models": shoal's configuration of each, "groups": worker groups}, as JSON.

A group is pods that are alike; several models may share one. Its name is made of what it is, so that it stays when a
model comes or goes. A model's stages are sent to their groups by the Ray label shoal-group. */}}
{{- define "shoal.plan" -}}
{{- $models := list -}}
{{- $order := list -}}
{{- $groups := dict -}}
{{- $names := dict -}}
{{- range $index, $model := .Values.models -}}
{{- $where := printf "\n\nmodels[%d] (%s)" $index $model.name -}}
{{- if hasKey $names $model.name -}}
{{- fail (printf "%s: two models are called %q: give each a name of its own" $where $model.name) -}}
{{- end -}}
{{- $_ := set $names $model.name true -}}
{{- $shape := include "shoal.shape" (dict "model" $model "where" $where) | fromJson -}}
{{- $count := include "shoal.count" (dict "model" $model "where" $where) | fromJson -}}
{{- $selectors := list -}}
{{- range $labels := $shape.labels -}}
{{- $pod := merge (dict "labels" $labels) $shape.pod -}}
{{- $name := printf "%s-%s" $shape.title (toJson $pod | sha256sum | trunc 6) -}}
{{- if not (hasKey $groups $name) -}}
{{- $order = append $order $name -}}
{{- $_ := set $groups $name (dict "name" $name "pod" $pod "hosts" $shape.hosts "first" 0 "min" 0 "max" 0) -}}
{{- end -}}
{{- $group := get $groups $name -}}
{{- range $bound := list "first" "min" "max" -}}
{{- $_ := set $group $bound (add (get $group $bound | int) (get $count $bound | int)) -}}
{{- end -}}
{{- $selectors = append $selectors (merge (dict "shoal-group" $name) $labels) -}}
{{- end -}}
{{- $settings := omit $model "gpu" "resources" "rankResources" "storage" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" -}}
{{- $settings = include "shoal.snake" $settings | fromJson -}}
{{- $_ := set $settings "engine" (merge (dict) (default dict $settings.engine) $shape.engine) -}}
{{- $_ := set $settings "resources" $shape.rank -}}
{{- $nodes := merge (dict "labels" (ternary (first $selectors) $selectors (eq (len $selectors) 1))) (default dict $settings.nodes) -}}
{{- $_ := set $settings "nodes" $nodes -}}
{{- $models = append $models $settings -}}
{{- end -}}
{{- $listed := list -}}
{{- range $order -}}{{- $listed = append $listed (get $groups .) -}}{{- end -}}
{{- toJson (dict "models" $models "groups" $listed) -}}
{{- end -}}

{{/* How many replicas: at first, at least, at most. */}}
{{- define "shoal.count" -}}
{{- $replicas := default 1 .model.replicas | int -}}
{{- $count := dict "first" $replicas "min" $replicas "max" $replicas -}}
{{- with .model.autoscaling -}}
{{- $min := dig "minReplicas" 1 . | int -}}
{{- $max := .maxReplicas | int -}}
{{- if gt $min $max -}}
{{- fail (printf "%s: autoscaling.minReplicas %d is more than autoscaling.maxReplicas %d" $.where $min $max) -}}
{{- end -}}
{{- if gt $replicas $max -}}
{{- fail (printf "%s: replicas %d to begin with are more than autoscaling.maxReplicas %d" $.where $replicas $max) -}}
{{- end -}}
{{- $count = dict "first" (max $replicas $min) "min" $min "max" $max -}}
{{- end -}}
{{- toJson $count -}}
{{- end -}}

{{/* The pods of one replica: {"title", "pod", "hosts", "labels": one for all or for each stage, "rank", "engine"}. */}}
{{- define "shoal.shape" -}}
{{- $model := .model -}}
{{- $where := .where -}}
{{- $tensor := default 1 $model.tensorParallel | int -}}
{{- $stages := default 1 $model.pipelineParallel | int -}}
{{- $gpu := default (dict "perRank" 0) $model.gpu -}}
{{- $perRank := dig "perRank" 1 $gpu | int -}}
{{- $perNode := dig "perNode" 8 $gpu | int -}}
{{- $given := default dict $model.rankResources -}}
{{- $engine := default dict $model.engine -}}
{{- $nodes := default dict $model.nodes -}}
{{- if and $model.stageLayers (ne (len $model.stageLayers) $stages) -}}
{{- fail (printf "%s: stageLayers has %d numbers for pipelineParallel %d: give each stage its layers" $where (len $model.stageLayers) $stages) -}}
{{- end -}}
{{- $labels := default dict $nodes.labels -}}
{{- if kindIs "map" $labels -}}
{{- $labels = list $labels -}}
{{- else if ne (len $labels) $stages -}}
{{- fail (printf "%s: nodes.labels has %d selectors for pipelineParallel %d: give each stage one, or a single mapping for all" $where (len $labels) $stages) -}}
{{- end -}}
{{- range $labels -}}{{- range $key, $value := . -}}
{{- if not (regexMatch "^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$" $value) -}}
{{- fail (printf "%s: nodes.labels.%s %q: pods get it as a label, so it must be a plain value" $where $key $value) -}}
{{- end -}}
{{- end -}}{{- end -}}
{{- if and (eq $engine.device "cuda") (eq $perRank 0) -}}
{{- fail (printf "%s: engine.device cuda without gpu: say gpu.perRank" $where) -}}
{{- end -}}
{{- if and (eq $engine.device "cpu") (gt $perRank 0) -}}
{{- fail (printf "%s: engine.device cpu with gpu.perRank %d: leave one of them out" $where $perRank) -}}
{{- end -}}
{{- if and (gt $perRank 0) (gt (mul $tensor $perRank) $perNode) -}}
{{- fail (printf "%s: tensorParallel %d with gpu.perRank %d needs more than gpu.perNode %d GPUs, and the ranks of one stage share a node: lower tensorParallel and raise pipelineParallel" $where $tensor $perRank $perNode) -}}
{{- end -}}
{{- if gt (dig "numGpus" $perRank $given | float64) (float64 $perRank) -}}
{{- fail (printf "%s: rankResources.numGpus %v is more than gpu.perRank %d" $where $given.numGpus $perRank) -}}
{{- end -}}
{{- range $key, $path := dict "model" $model.model "speculative.model" (ternary (default dict $model.speculative) dict (kindIs "map" $model.speculative)).model -}}
{{- if and $path (ne $path "smollm2-135m-instruct") (not (regexMatch "^(/|hf://[^/]+/[^/]+)" $path)) -}}
{{- fail (printf "%s: %s %q: name hf://ORG/NAME, a path that begins with /, or the embedded smollm2-135m-instruct" $where $key $path) -}}
{{- end -}}
{{- end -}}
{{/* Stages of one pod: those that fit a node, dealt evenly. With a label for each stage, or far apart, it is one. */}}
{{- $fitting := $stages -}}
{{- if gt $perRank 0 -}}{{- $fitting = min $stages (div $perNode (mul $tensor $perRank)) -}}{{- end -}}
{{- if or (eq $nodes.stages "strict_spread") (gt (len $labels) 1) -}}{{- $fitting = 1 -}}{{- end -}}
{{- $hosts := div (add $stages $fitting -1) $fitting -}}
{{- $perPod := mul (div (add $stages $hosts -1) $hosts) $tensor -}}
{{- if gt (len $labels) 1 -}}{{- $hosts = 1 -}}{{- end -}}
{{- $isAlone := eq (mul $tensor $stages | int) 1 -}}
{{- $resources := default dict $model.resources -}}
{{- $cpu := dig "cpu" (ternary (add (mul $perPod 4) 1) (mul $perPod (default 2 $engine.numThreads | int)) (gt $perRank 0)) $resources | int -}}
{{- $memory := dig "memory" (printf "%dGi" (mul $perPod (ternary 64 8 (gt $perRank 0)))) $resources -}}
{{- $coordinator := ternary 1 0 (and (gt $perRank 0) (not $isAlone)) -}}
{{- $threads := default (max 1 (div (sub $cpu $coordinator) $perPod)) $engine.numThreads | int -}}
{{- $rankCpus := dig "numCpus" (ternary 1 $threads (gt $perRank 0)) $given -}}
{{- if gt (addf (mulf $rankCpus $perPod) $coordinator) (float64 $cpu) -}}
{{- fail (printf "%s: resources.cpu %d is too little for a pod of %d ranks with %v CPUs each%s: raise it, or lower %s" $where $cpu (int $perPod) $rankCpus (ternary " and their coordinator" "" (gt $coordinator 0)) (ternary "rankResources.numCpus" "engine.numThreads" (gt $perRank 0))) -}}
{{- end -}}
{{- $pod := dict "cpu" $cpu "memory" $memory "ephemeralStorage" (dig "ephemeralStorage" "" $resources) -}}
{{- $_ := set $pod "gpus" (mul $perPod $perRank) -}}
{{- $_ := set $pod "hosts" $hosts -}}
{{- $_ := set $pod "gpuType" (dig "type" "" $gpu) -}}
{{- $_ := set $pod "gpuResource" (dig "resourceName" "nvidia.com/gpu" $gpu) -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" -}}
{{- with get $model $key -}}{{- $_ := set $pod $key . -}}{{- end -}}
{{- end -}}
{{- $title := ternary (printf "cpu%d" $cpu) (printf "%sx%d" (default "gpu" $pod.gpuType | lower | replace "_" "-" | replace "." "-" | trunc 20) (int $pod.gpus)) (eq $perRank 0) -}}
{{- $rank := dict "num_cpus" $rankCpus "num_gpus" (dig "numGpus" $perRank $given) -}}
{{- $decided := dict "device" (ternary "cuda" "cpu" (gt $perRank 0)) "num_threads" $threads -}}
{{- toJson (dict "title" $title "pod" $pod "hosts" $hosts "labels" $labels "rank" $rank "engine" $decided) -}}
{{- end -}}

{{/* The whole of serveConfigV2. Nothing secret is in it: secrets come as files and environment. */}}
{{- define "shoal.serveConfig" -}}
{{- $values := .root.Values -}}
{{- $args := dict "models" .plan.models "gateways" $values.gateways.replicas -}}
{{- range $block := list "http" "admin" "tracing" "logging" -}}
{{- with get $values $block -}}{{- $_ := set $args $block (include "shoal.snake" . | fromJson) -}}{{- end -}}
{{- end -}}
{{- $_ := set $args "gateway_labels" ($values.gatewayLabels | default (dict "shoal-group" (ternary "gateway" "head" $values.gateways.pods.enabled))) -}}
{{- $auth := include "shoal.snake" (omit $values.auth "existingSecret" "secretKey" "keys") | fromJson -}}
{{- if include "shoal.keysSecret" .root -}}
{{- $_ := set $auth "keys_file" (printf "/etc/shoal/keys/%s" $values.auth.secretKey) -}}
{{- end -}}
{{- with $auth -}}{{- $_ := set $args "auth" . -}}{{- end -}}
{{- $app := dict "name" "shoal" "route_prefix" "/" "import_path" "shoal.cluster.app:app" "args" $args -}}
{{- $http := dict "host" $values.http.host "port" $values.http.port -}}
{{- toYaml (dict "proxy_location" "EveryNode" "http_options" $http "applications" (list $app)) -}}
{{- end -}}
