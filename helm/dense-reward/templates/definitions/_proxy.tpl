{{/* The proxy in front of the replicas: files/haproxy.cfg, which docs/scale.md describes. */}}

{{/* Who answers at the service's name. */}}
{{- define "dense-reward.frontComponent" -}}
{{- ternary "proxy" "service" .Values.proxy.enabled -}}
{{- end -}}

{{- define "dense-reward.proxyLabels" -}}
{{ include "dense-reward.selectorLabels" . }}
app.kubernetes.io/component: proxy
{{- end -}}

{{/* A replica's limit for a request, in whole seconds. */}}
{{- define "dense-reward.requestSeconds" -}}
{{- default 600 .Values.settings.max_request_s | float64 | ceil | int -}}
{{- end -}}

{{- define "dense-reward.proxyEnv" -}}
{{- $replicas := printf "%s-replicas.%s.svc" (include "dense-reward.fullname" .) .Release.Namespace -}}
- name: REPLICAS
  value: {{ printf "%s.%s:8000" $replicas .Values.proxy.clusterDomain | quote }}
- name: MAX_REPLICAS
  value: {{ int .Values.proxy.maxReplicas | quote }}
- name: SERVER_S
  value: {{ add (include "dense-reward.requestSeconds" .) 10 | quote }}
{{- end -}}

{{- define "dense-reward.refuseProxy" -}}
{{- $a := .Values.autoscaling -}}
{{- $most := ternary .Values.replicaCount $a.maxReplicaCount (eq $a.kind "none") | int -}}
{{- if lt (int .Values.proxy.maxReplicas) (add $most .Values.maxSurge | int) -}}
{{- fail (printf "proxy.maxReplicas: %d is fewer than the %d replicas that a rolling update can run: raise it" (int .Values.proxy.maxReplicas) (add $most .Values.maxSurge)) -}}
{{- end -}}
{{- if .Values.tls.secretName -}}
{{- fail "proxy.enabled: the proxy speaks http to callers and replicas: remove tls.secretName and end TLS at the ingress, or remove the proxy" -}}
{{- end -}}
{{- if or (hasSuffix ":latest" .Values.proxy.image) (not (contains ":" (last (splitList "/" .Values.proxy.image)))) -}}
{{- fail (printf "proxy.image: %s has no tag or the tag latest: name a version or a digest" .Values.proxy.image) -}}
{{- end -}}
{{- end -}}
